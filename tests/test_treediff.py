"""The tree comparison finds every kind of difference, and none in a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.treediff import compare, scan


def _make(root: Path) -> Path:
    (root / "directory").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    (root / "other").write_bytes(b"other")
    os.link(root / "file", root / "directory" / "linked")
    (root / "symlink").symlink_to("file")
    os.mkfifo(root / "fifo")
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)
    return root


def _relink(root: Path) -> None:
    (root / "directory" / "linked").unlink()
    shutil.copy2(root / "file", root / "directory" / "linked")


def _same_size_and_time(root: Path) -> None:
    status = (root / "other").stat()
    (root / "other").write_bytes(b"OTHER")
    os.utime(root / "other", ns=(0, status.st_mtime_ns))


def _another_target(root: Path) -> None:
    (root / "symlink").unlink()
    (root / "symlink").symlink_to("elif")


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "other").unlink(), "other: missing"),
    (lambda root: (root / "new").touch(), "new: should not be there"),
    (lambda root: (root / "other").chmod(0o600), "other: mode"),
    (lambda root: os.utime(root / "fifo", ns=(0, 1_700_000_000_123_456_788)), "fifo: mtime"),
    (lambda root: os.setxattr(root / "other", "user.x", b"\0\xff"), "other: xattr user.x should be None"),
    (_same_size_and_time, "other: content"),
    (_another_target, "symlink: target"),
    (_relink, "directory/linked: nlink"),
    (_relink, "file: links"),
]


def test_copy_is_the_same(tmp_path: Path) -> None:
    one, two = _make(tmp_path / "one"), tmp_path / "two"
    subprocess.run(["cp", "-a", one, two], check=True)
    assert compare(scan(one), scan(two)) == []


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_change_is_found(tmp_path: Path, change: Callable[[Path], object], line: str) -> None:
    one, two = _make(tmp_path / "one"), _make(tmp_path / "two")
    change(two)
    lines = compare(scan(one), scan(two))
    assert any(found.startswith(line) for found in lines), lines


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_owner_and_device_are_compared(tmp_path: Path) -> None:
    one, two = _make(tmp_path / "one"), _make(tmp_path / "two")
    for root, minor in ((one, 3), (two, 300)):
        os.mknod(root / "device", 0o020666, os.makedev(1, minor))
        os.utime(root / "device", (0, 0))
    os.chown(two / "other", 1, 2)
    lines = compare(scan(one), scan(two), ignored_mtimes=[b"."])
    assert lines == [
        "device: rdev should be (1, 3), is (1, 300)",
        "other: owner should be '0:0', is '1:2'",
    ]


def test_ignored_mtime(tmp_path: Path) -> None:
    one, two = _make(tmp_path / "one"), _make(tmp_path / "two")
    os.utime(two, (0, 0))
    assert compare(scan(one), scan(two), ignored_mtimes=[b"."]) == []
