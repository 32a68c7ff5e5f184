"""What tests of the format page convert: a directory and layers with every way in which a file's data can lie."""

from __future__ import annotations

import os
import random
import stat
import tarfile
from pathlib import Path

from tests.images.layout import write_layers
from tests.support.tars import Tar

MIB = 1 << 20


def make_directory(root: Path) -> None:
    """Small, large, packed, sparse, incompressible and duplicate files, devices, links and attributes."""
    noise = random.Random(20)
    (root / "many").mkdir(parents=True)
    for number in range(600):
        (root / "many" / f"a file with a long name {number:04}").write_bytes(b"%d\n" % number * (number % 9))
    (root / "empty").touch()
    (root / "page").write_bytes(b"p" * 4096)
    (root / "page and a byte").write_bytes(b"q" * 4097)
    (root / "noise").write_bytes(noise.randbytes(3 * MIB))
    (root / "noise, odd").write_bytes(noise.randbytes(MIB + 4097))
    (root / "noise again").write_bytes((root / "noise").read_bytes())
    (root / "noise, cut").write_bytes((root / "noise").read_bytes()[:1_500_000])
    (root / "text").write_bytes(b"".join(b"line %d\n" % number for number in range(1_000_000)))
    (root / "few zeros").write_bytes(bytes(20_000))
    (root / "zeros").write_bytes(bytes(3 * MIB))
    _write_sparse(root / "hole", 5 * MIB + 1, {})
    _write_sparse(root / "large hole", 256 * MIB + 1, {})
    _write_sparse(
        root / "holes",
        40 * MIB + 3,
        {0: noise.randbytes(10_000), 20 * MIB: noise.randbytes(300_000), 40 * MIB: b"end"},
    )
    _write_sparse(
        root / "large clusters",
        513 * MIB + 5001,
        {3 * MIB: b"x", 500 * MIB: noise.randbytes(2 * MIB), 513 * MIB: noise.randbytes(5001)},
    )
    _make_specials(root)
    _set_attributes(root)


def _write_sparse(path: Path, size: int, data: dict[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, piece in data.items():
            file.seek(offset)
            file.write(piece)


def _make_specials(root: Path) -> None:
    (root / "many" / "link").hardlink_to(root / "noise")
    (root / "another link").hardlink_to(root / "noise")
    (root / "symlink").symlink_to("noise")
    (root / "long symlink").symlink_to("n" * 4000)
    os.mknod(root / "character", stat.S_IFCHR | 0o640, os.makedev(300, 70_000))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    os.mkfifo(root / "fifo")


def _set_attributes(root: Path) -> None:
    for name in ("noise", "page", "many", "text"):
        os.setxattr(root / name, "user.shared", bytes(range(256)))
    os.setxattr(root / "page", "user.empty", b"")
    os.setxattr(root / "text", "trusted.long", b"t" * 2000)
    os.setxattr(root / "noise, cut", "user.own", b"\0")
    os.chown(root / "page", 70_000, 4_000_000_000)
    (root / "empty").chmod(0o4755)
    os.utime(root / "page", ns=(0, -5_500_000_001))
    os.utime(root / "text", ns=(0, (1 << 33) * 10**9 + 7))


def make_layers(directory: Path) -> Path:
    """An image of three layers (one in gzip) with whiteouts and links across layers; returns its OCI layout."""
    noise = random.Random(3)
    large, small = noise.randbytes(2 * MIB + 77), b"small\n" * 100
    directory.mkdir(parents=True)
    base, middle, top = (Tar(tarfile.PAX_FORMAT) for _ in range(3))
    base.add("./", "dir", mtime=1_600_000_000)
    for name in ("etc/", "gone/", "opaque/", "kept/"):
        base.add(f"./{name}", "dir", mtime=1_600_000_001)
    base.add("./kept/large", data=large, mtime=1_600_000_002, uid=1000, gid=100, mode=0o4711)
    base.add("./kept/attributes", data=small, pax_headers={"SCHILY.xattr.user.one": "value", "mtime": "1.000000009"})
    base.add("./etc/removed", data=large[:MIB])
    base.add("./etc/replaced", data=b"old")
    base.add("./gone/file", data=small)
    base.add("./opaque/hidden", data=b"hidden")
    base.add("./kept/null", "char", devmajor=1, devminor=3, mode=0o666)
    base.add("./kept/pipe", "fifo")
    middle.add("./etc/", "dir", mtime=1_600_000_003)
    middle.add("./etc/.wh.removed").add("./etc/replaced", "dir", mtime=1_600_000_004)
    middle.add("./etc/replaced/by a directory", data=large[: MIB + 1])
    middle.add("./", "dir", mtime=1_600_000_005).add("./.wh.gone")
    middle.add("./opaque/", "dir", mtime=1_600_000_006).add("./opaque/.wh..wh..opq").add("./opaque/seen", data=small)
    top.add("./", "dir", mtime=1_600_000_007).add("./again", data=large, mtime=-7)
    top.add("./linked", "link", linkname="./kept/large")
    top.add("./to", "symlink", linkname="kept/large")
    tars = []
    for number, tar in enumerate((base, middle, top)):
        tars.append(directory / f"{number}.tar")
        tars[-1].write_bytes(bytes(tar))
    write_layers(directory / "oci", tars, ["gzip", "none", "none"], {"Cmd": ["/bin/true"]})
    return directory / "oci"
