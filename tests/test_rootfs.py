"""A directory as a layer equals the directory."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest

from erofs_builder.rootfs import build_rootfs
from erofs_builder.tree import flatten
from tests.support.nodes import Seen, decoded_blobs, see_disk, see_nodes


def fill(root: Path) -> None:
    """Files of all sizes, links, a sparse file, odd names."""
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "small").write_bytes(b"small")
    (root / "empty").write_bytes(b"")
    (root / "large.so").write_bytes(b"\x7fELF" + b"".join(bytes([n % 251]) * 5000 for n in range(200)))
    os.link(root / "sub" / "small", root / "a-link")
    os.link(root / "sub" / "small", root / "sub" / "deep" / "link")
    (root / "symlink").symlink_to("nowhere/at all")
    os.mkfifo(root / "fifo", 0o640)
    Path(os.fsdecode(bytes(root) + b"/latin-\xe9")).write_bytes(b"x")
    with open(root / "sparse", "wb") as file:
        for offset in (5000, 700_000, 2_000_000):
            file.seek(offset)
            file.write(b"island")
        file.truncate(5_000_000)
    os.utime(root / "sub", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "empty", ns=(1, -5_000_000_001))


def build(root: Path) -> tuple[dict[bytes, Seen], bytes]:
    out = io.BytesIO()
    layer = build_rootfs(root, out)
    return see_nodes(flatten([layer]), decoded_blobs([(layer, out.getvalue())])), out.getvalue()


def test_equals_the_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root)
    found, blob = build(root)
    assert found == see_disk(root)
    assert len(blob) < 200_000
    assert build(root) == (found, blob)


@pytest.mark.root
def test_devices_xattrs_and_owners(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "disk", 0o060660, os.makedev(259, 70000))
    os.mknod(root / "disk2", 0o060660, os.makedev(259, 70000))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    (root / "f").write_bytes(b"f")
    os.chown(root / "f", 70_000, 4_294_967_290)
    (root / "f").chmod(0o4711)
    os.setxattr(root / "f", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.setxattr(root / "f", "user.binary", bytes(range(256)))
    os.setxattr(root / "null", "trusted.x", b"\0")
    os.setxattr(root, "user.root", b"on the root")
    found, _ = build(root)
    assert found == see_disk(root)


def test_a_file_that_shrinks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    reported = os.pread

    def shortened(descriptor: int, size: int, offset: int) -> bytes:
        return b"" if size > 8 else reported(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", shortened)
    with pytest.raises(Exception, match="f: became shorter"):
        build_rootfs(tmp_path, io.BytesIO())


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    for wrong in ("f", "missing"):
        with pytest.raises(OSError, match=wrong):
            build_rootfs(tmp_path / wrong, io.BytesIO())
