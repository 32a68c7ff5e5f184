"""mounts/: mountinfo's text, and EROFS mounted for real through fsopen(2)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounts import MountError, mount_erofs, mountinfo, parse_mountinfo, umount2
from mounts.syscalls import MNT_DETACH
from tests.support import erofs_utils

SUPERBLOCK = 1024


def test_mountinfo_line() -> None:
    text = r"90 31 0:44 / /mnt/a\040b\134c rw,noatime shared:7 master:2 - erofs /im\011g ro,user_xattr,device=x" + "\n"
    (mount,) = parse_mountinfo(text)
    assert mount == (90, 31, (0, 44), "/", "/mnt/a b\\c", "rw,noatime", "erofs", "/im\tg", "ro,user_xattr,device=x")


@pytest.mark.parametrize(
    "line", ["", "90 31 0:44 / /mnt rw", "90 31 0:44 / - erofs x", "90 31 x / /mnt rw - erofs a b"]
)
def test_mountinfo_malformed(line: str) -> None:
    with pytest.raises(ValueError):
        list(parse_mountinfo(line + "\n"))


def test_mountinfo_of_this_process() -> None:
    assert any(mount.target == "/" for mount in mountinfo())
    assert mountinfo("no such type") == []


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    while any(mount.target == str(directory) for mount in mountinfo("erofs")):
        umount2(directory, MNT_DETACH)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_bytes(b"hello\n" * 5000)
    path = tmp_path / "image.erofs"
    erofs_utils.run("mkfs.erofs", "--quiet", path, tree)
    return path


def with_devices(image: Path, count: int) -> Path:
    """The same image with a device table of `count` empty slots behind it."""
    data = bytearray(image.read_bytes())
    data += bytes(-len(data) % 4096)
    slots = len(data) // 128
    struct.pack_into("<I", data, SUPERBLOCK + 8, 0)  # feature_compat: no checksum any more
    (incompat,) = struct.unpack_from("<I", data, SUPERBLOCK + 80)
    struct.pack_into("<I", data, SUPERBLOCK + 80, incompat | 0x8)
    struct.pack_into("<HH", data, SUPERBLOCK + 86, count, slots)
    for number in range(count):
        data += struct.pack("<64sII56x", b"%064x" % number, 16, 0)
    data += bytes(-len(data) % 65536)
    path = image.with_suffix(".devices")
    path.write_bytes(data)
    return path


@pytest.mark.root
def test_mount_and_umount(image: Path, target: Path) -> None:
    mount_erofs(image, [], ["user_xattr"], target)
    (mount,) = [mount for mount in mountinfo("erofs") if mount.target == str(target)]
    assert "ro" in mount.options.split(",")
    assert (target / "hello").read_bytes() == b"hello\n" * 5000
    umount2(target)
    assert list(target.iterdir()) == []


@pytest.mark.root
def test_more_devices_than_a_mount_page_holds(image: Path, target: Path, tmp_path: Path) -> None:
    blobs = [tmp_path / f"blob-with-a-rather-long-name-to-fill-the-page-{number}" for number in range(127)]
    for blob in blobs:
        blob.write_bytes(bytes(65536))
    assert len(",".join(f"device={blob}" for blob in blobs)) > 4096
    mount_erofs(with_devices(image, 127), blobs, [], target)
    assert (target / "hello").read_bytes() == b"hello\n" * 5000


@pytest.mark.root
def test_missing_devices_are_refused(image: Path, target: Path) -> None:
    with pytest.raises(MountError) as caught:
        mount_erofs(with_devices(image, 3), [image], [], target)
    assert "create superblock" in str(caught.value)


@pytest.mark.root
def test_error_has_the_kernels_own_words(image: Path, target: Path) -> None:
    with pytest.raises(MountError) as caught:
        mount_erofs(image, [], ["no_such_option=1"], target)
    assert "no_such_option" in str(caught.value)
    assert any("no_such_option" in line for line in caught.value.log)


@pytest.mark.root
def test_not_an_image(tmp_path: Path, target: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(os.urandom(65536))
    with pytest.raises(MountError):
        mount_erofs(junk, [], [], target)
    with pytest.raises(OSError):
        umount2(target)


@pytest.mark.root
def test_failures_leave_no_descriptor(image: Path, target: Path) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        with pytest.raises(MountError):
            mount_erofs(image, [], ["no_such_option"], target)
        mount_erofs(image, [], [], target)
        umount2(target)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
