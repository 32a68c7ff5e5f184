"""An image of everything that a tar layer may hold, and one of 127 layers. Deterministic.

Trees with real extended attributes, ACLs, capabilities and holes are archived by GNU tar and bsdtar; what those would
not write (lying order, duplicates, missing parents, base-256 numbers, whiteouts) comes from Python's tarfile.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.images.layout import write_layers

TIME = 1_700_000_000
YEAR_9999 = 253_402_300_799
# Paths whose mtime no entry of the image defines: parents that only the names of entries imply.
UNDEFINED_MTIMES = [b".", b"implied", b"implied/by", b"implied/by/a", b"implied/by/a/name"]
NOBODY = 0xFFFFFFFF


def _acl(owner: int, user: tuple[int, int], group: int, mask: int, other: int) -> bytes:
    """A POSIX ACL as the kernel's extended attribute holds it, with one named user (permissions, uid)."""
    entries = [(1, owner, NOBODY), (2, *user), (4, group, NOBODY), (16, mask, NOBODY), (32, other, NOBODY)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACCESS_ACL = _acl(6, (4, 1234), 4, 4, 0)
DEFAULT_ACL = _acl(7, (5, 4321), 5, 5, 0)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


class Layer:
    """A tar file written entry by entry."""

    def __init__(self, path: Path, form: int) -> None:
        self.path = path
        self.tar = tarfile.TarFile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape")

    def add(self, name: str | bytes, data: bytes | None = None, kind: bytes | None = None, **fields: object) -> None:
        """Add an entry: a regular file when it has `data`, else of the type `kind` (default: directory)."""
        info = tarfile.TarInfo(os.fsdecode(name))
        info.type = kind or (tarfile.DIRTYPE if data is None else tarfile.REGTYPE)
        info.mode = 0o755 if info.isdir() else 0o644
        info.mtime, info.size = TIME, len(data or b"")
        for key, value in fields.items():
            setattr(info, key, value)
        self.tar.addfile(info, io.BytesIO(data) if data is not None else None)

    def close(self) -> Path:
        self.tar.close()
        return self.path


def _noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _gnu_headers(path: Path) -> Path:
    layer = Layer(path, tarfile.GNU_FORMAT)
    layer.add("./")
    layer.add("lower/")
    layer.add("lower/file", b"from the lowest layer\n", mode=0o4755, uid=1000, gid=1001)
    layer.add("lower/empty", b"")
    layer.add("lower/huge-ids", b"ids", uid=2**32 - 2, gid=2**31)
    layer.add("lower/before-1970", b"old", mtime=-86_400 * 365 * 30)
    layer.add("lower/one-second-before", b"old", mtime=-1)
    layer.add("lower/after-2038", b"new", mtime=2**32 + 12345)
    layer.add("lower/year-9999", b"new", mtime=YEAR_9999)
    layer.add("lower/" + "n" * 255, b"the longest name")
    layer.add("lower/" + "/".join(["d" * 100] * 4) + "/leaf", b"long path", mode=0o600)
    for depth in range(1, 5):
        layer.add("lower/" + "/".join(["d" * 100] * depth))
    layer.add("lower/long-link", kind=tarfile.SYMTYPE, linkname="x" * 1000, mode=0o777)
    layer.add("lower/dangling", kind=tarfile.SYMTYPE, linkname="../nowhere", mode=0o777)
    layer.add(b"lower/latin1-\xe9\xff", b"not UTF-8")
    layer.add(b"lower/\xe9\xff-link", kind=tarfile.SYMTYPE, linkname=os.fsdecode(b"latin1-\xe9\xff"), mode=0o777)
    layer.add("lower/new\nline", b"a name with a line feed")
    layer.add("lower/back\\slash \t tab", b"a name with a backslash")
    layer.add("lower/fifo", kind=tarfile.FIFOTYPE, mode=0o620)
    layer.add("lower/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    layer.add("lower/loop", kind=tarfile.BLKTYPE, devmajor=7, devminor=300, mode=0o660, gid=6)
    layer.add("lower/sticky", mode=0o1777)
    layer.add("lower/setgid", mode=0o2755)
    layer.add("lower/linked", b"a file with several names\n" * 400, mtime=TIME + 5)
    layer.add("lower/linked-again", kind=tarfile.LNKTYPE, linkname="lower/linked", mtime=TIME + 5)
    layer.add("lower/sub/", mode=0o700)
    layer.add("lower/sub/linked", kind=tarfile.LNKTYPE, linkname="./lower/linked", mtime=TIME + 5)
    layer.add("lower/fifo-again", kind=tarfile.LNKTYPE, linkname="lower/fifo", mode=0o620)
    _fill_for_upper(layer)
    return layer.close()


def _fill_for_upper(layer: Layer) -> None:
    """What the upper layers hide, replace and change."""
    for name in ("hidden-file", "replaced-by-directory", "touched", "comes-back"):
        layer.add(f"lower/{name}", name.encode() * 300)
    for directory in (
        "hidden-directory",
        "opaque",
        "opaque-late",
        "replaced-by-file",
        "replaced-by-symlink",
        "there-and-back",
    ):
        layer.add(f"lower/{directory}/")
        layer.add(f"lower/{directory}/child", directory.encode() * 100)
        layer.add(f"lower/{directory}/deep/")
        layer.add(f"lower/{directory}/deep/child", b"deep")
    layer.add("lower/kept-directory/")
    layer.add("lower/kept-directory/kept", b"kept")


def _posix_tree(root: Path) -> None:
    """A tree with what only a real file system can give to an archiver."""
    top = root / "posix"
    (top / "sub").mkdir(parents=True)
    (top / "nanoseconds").write_bytes(b"mtime with nanoseconds")
    (top / "capability").write_bytes(b"#!/bin/true\n")
    os.setxattr(top / "capability", "security.capability", CAPABILITY)
    (top / "acl").write_bytes(b"read me")
    os.setxattr(top / "acl", "system.posix_acl_access", ACCESS_ACL)
    os.setxattr(top / "sub", "system.posix_acl_default", DEFAULT_ACL)
    (top / "attributes").write_bytes(b"attributes")
    os.setxattr(top / "attributes", "user.binary", bytes(range(256)))
    os.setxattr(top / "attributes", "user.empty", b"")
    os.setxattr(top / "attributes", "user.equals=sign", b"a=b\nc=d")
    os.setxattr(top / "attributes", "user.long", _noise(1, 3000))
    os.setxattr(top / "attributes", "trusted.other", b"trusted")
    (top / "same-attributes").write_bytes(b"shared xattr")
    os.setxattr(top / "same-attributes", "user.binary", bytes(range(256)))
    os.setxattr(top / "sub", "user.on-directory", b"directory")
    os.link(top / "attributes", top / "sub" / "attributes-link")
    (top / "umlaut-\u00e4\u4e16").write_bytes(b"UTF-8 name")
    (top / ("very-" * 30 + "long")).write_bytes(b"long name")
    _sparse_file(top / "sparse", 40 << 20, 7)
    _settle(root)


def _sparse_file(path: Path, size: int, seed: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for number, offset in enumerate(range(0, size, size // 9)):
            file.seek(offset + 4096 * number)
            file.write(_noise(seed + number, 5000 + number))
    # The last bytes stay a hole.
    os.truncate(path, size + 12345)


def _settle(root: Path, nanoseconds: int = 123_456_789) -> None:
    """Give every path a time of its own; children before their directories."""
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, (TIME + number) * 10**9 + nanoseconds), follow_symlinks=False)


def _sparse_tree(name: str, seed: int) -> Callable[[Path], None]:
    def fill(root: Path) -> None:
        (root / "sparse").mkdir()
        _sparse_file(root / "sparse" / name, 3 << 20, seed)
        with open(root / "sparse" / f"{name}-hole", "wb") as file:
            file.truncate(1_000_001)
        (root / "sparse" / f"{name}-dense").write_bytes(_noise(seed, 10_000))
        _settle(root, 0 if name == "gnu" else 987_654_321)  # GNU's own form holds whole seconds

    return fill


def _bsd_tree(root: Path) -> None:
    top = root / "bsd"
    top.mkdir()
    Path(os.fsdecode(bytes(top) + b"/latin1-\xe9")).write_bytes(b"not UTF-8, written by bsdtar")
    (top / "attributes").write_bytes(b"attributes by bsdtar")
    os.setxattr(top / "attributes", "user.bsd", b"\x00\xff\n")
    (top / "linked").write_bytes(b"links by bsdtar")
    os.link(top / "linked", top / "linked-again")
    (top / "symlink").symlink_to("linked")
    os.mkfifo(top / "fifo")
    (top / ("prefix-" * 12)).mkdir()
    (top / ("prefix-" * 12) / ("name-" * 25)).write_bytes(b"long")
    _settle(root)


def _archive(path: Path, scratch: Path, fill: Callable[[Path], None], *command: str) -> Path:
    """Fill a tree and let another program archive it."""
    root = scratch / "tree"
    root.mkdir()
    try:
        fill(root)
        names = sorted(entry.name for entry in root.iterdir())
        # bsdtar warns of names that are not UTF-8, and writes them.
        subprocess.run([*command, "-C", root, "-cf", path, *names], check=True, stderr=subprocess.DEVNULL)
    finally:
        shutil.rmtree(root)
    return path


def _gnu_tar(*options: str) -> list[str]:
    return ["tar", "--sort=name", "--numeric-owner", "--owner=7", "--group=8", *options]


def _posix_tar(*options: str) -> list[str]:
    fixed = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"
    return _gnu_tar("--format=posix", fixed, *options)


def _upper(path: Path) -> Path:
    """Whiteouts, replacements, links to lower layers, duplicates, entries without parents."""
    layer = Layer(path, tarfile.PAX_FORMAT)
    layer.add("lower/.wh.hidden-file", b"")
    layer.add("lower/.wh.hidden-directory", b"")
    layer.add("lower/.wh.never-was-there", b"")
    layer.add("lower/.wh.comes-back", b"")
    layer.add("lower/opaque/", mtime=TIME + 77)
    layer.add("lower/opaque/.wh..wh..opq", b"")
    layer.add("lower/opaque/new", b"new in an opaque directory")
    layer.add("lower/opaque-late/", mtime=TIME + 78)
    layer.add("lower/opaque-late/new", b"before its opaque marker")
    layer.add("lower/opaque-late/.wh..wh..opq", b"")
    layer.add("lower/replaced-by-directory/", mode=0o711)
    layer.add("lower/replaced-by-directory/inside", b"inside")
    layer.add("lower/replaced-by-file", b"now a file")
    layer.add("lower/replaced-by-symlink", kind=tarfile.SYMTYPE, linkname="kept-directory", mode=0o777)
    layer.add("lower/there-and-back", b"a file between two directories")
    layer.add("lower/touched", b"touched" * 300, mode=0o600, uid=5, pax_headers={"mtime": "1700000123.987654321"})
    layer.add("across/")
    layer.add("across/link", kind=tarfile.LNKTYPE, linkname="lower/file", mode=0o4755, uid=1000, gid=1001)
    layer.add("across/link-to-attributes", kind=tarfile.LNKTYPE, linkname="posix/attributes")
    layer.add("across/twice", b"first version, longer than the second")
    layer.add("across/twice", b"second", mode=0o640)
    layer.add("across/directory-twice/", mode=0o700)
    layer.add("across/directory-twice/child", b"child")
    layer.add("across/directory-twice/", mode=0o755)
    layer.add("across/file-then-symlink", b"file")
    layer.add("across/file-then-symlink", kind=tarfile.SYMTYPE, linkname="twice", mode=0o777)
    layer.add("implied/by/a/name/file", b"no entry made its parents")
    layer.add("./across/../across/./dotted", b"a name with dots")
    layer.add("/across/absolute", b"a name from the root")
    layer.add("across/large", _noise(3, 9_000_000) + bytes(3_000_000) + b"text " * 300_000)
    layer.add("across/large-copy", _noise(3, 9_000_000) + bytes(3_000_000) + b"text " * 300_000)
    return layer.close()


def _last(path: Path) -> Path:
    layer = Layer(path, tarfile.PAX_FORMAT)
    layer.add("lower/there-and-back/", mode=0o750)
    layer.add("lower/there-and-back/again", b"a directory again")
    layer.add("lower/comes-back", b"back, two layers later")
    # A new file in place of one name of a hard-linked file leaves the other names as they are.
    layer.add("lower/linked-again", b"no longer a link")
    layer.add("across/copy-of-lower", b"from the lowest layer\n")
    return layer.close()


def _make_layers(directory: Path, gnu_sparse: bool) -> Iterator[Path]:
    yield _gnu_headers(directory / "0.tar")
    command = _posix_tar("--xattrs", "--xattrs-include=*", "--sparse")
    yield _archive(directory / "1.tar", directory, _posix_tree, *command)
    command = _gnu_tar("--format=gnu", "--sparse") if gnu_sparse else _posix_tar("--sparse")
    yield _archive(directory / "2.tar", directory, _sparse_tree("gnu", 20), *command)
    for number, version in ((3, "0.0"), (4, "0.1")):
        command = _posix_tar("--sparse", f"--sparse-version={version}")
        yield _archive(directory / f"{number}.tar", directory, _sparse_tree(f"pax{version}", number * 30), *command)
    command = ["bsdtar", "--format=pax", "--uid=3", "--gid=4", "--uname=", "--gname="]
    yield _archive(directory / "5.tar", directory, _bsd_tree, *command)
    yield _upper(directory / "6.tar")
    yield _last(directory / "7.tar")


def build_adversarial(directory: Path) -> None:
    """Make the image in `directory`/oci.

    `directory`/oracle has the same image for umoci and buildah, which know neither GNU's own sparse entries nor (in
    umoci) zstd: that layer archived in PAX form, all uncompressed. The tag `xattrs` in both has the two layers with
    extended attributes alone, which buildah can read: it refuses a path that comes twice in one layer.
    `undefined-mtimes.json` lists the paths whose mtime no entry defines.
    """
    for name, gnu_sparse in (("oci", True), ("oracle", False)):
        tars = list(_make_layers(directory, gnu_sparse))
        methods = ["gzip", "zstd", "none", "gzip", "zstd", "none", "gzip", "none"] if gnu_sparse else ["none"] * 8
        write_layers(directory / name, tars, methods, {"Cmd": ["/bin/true"]})
        write_layers(directory / name, [tars[1], tars[5]], ["gzip"] * 2, {"Cmd": ["/bin/true"]}, "xattrs")
        for tar in tars:
            tar.unlink()
    (directory / "undefined-mtimes.json").write_text(json.dumps([os.fsdecode(path) for path in UNDEFINED_MTIMES]))


def mend_umoci(tree: Path) -> None:
    """Correct what umoci 0.4 does wrong with the image of build_adversarial, unpacked at `tree`."""
    # Go's archive/tar takes an empty PAX value for a deletion; GNU tar, which wrote it, restores it.
    os.setxattr(tree / "posix" / "attributes", "user.empty", b"")
    # Nanoseconds in 64 bits end in 2262.
    os.utime(tree / "lower" / "year-9999", (YEAR_9999, YEAR_9999))
    # A whiteout's removal of a name touches the directory, whose entry says otherwise.
    os.utime(tree / "lower", (TIME, TIME))


def build_layers127(directory: Path) -> None:
    """Make the image of 127 layers in `directory`/oci: each adds a file, changes one and hides one."""
    tars = []
    for number in range(127):
        layer = Layer(directory / f"{number}.tar", tarfile.USTAR_FORMAT)
        if number == 0:
            layer.add("./")
        layer.add(f"layer{number:03}/")
        layer.add(f"layer{number:03}/own", _noise(number, 3000 + 100 * number))
        layer.add(f"layer{number:03}/passing", b"hidden by the next layer")
        layer.add("counter", f"{number}\n".encode() * 1000, mtime=TIME + number)
        if number:
            layer.add(f"layer{number - 1:03}/.wh.passing", b"")
        tars.append(layer.close())
    write_layers(directory / "oci", tars, ["none"] * len(tars), {"Cmd": ["/bin/true"]})
    for tar in tars:
        tar.unlink()
