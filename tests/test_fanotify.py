"""fanotify/: events and responses as bytes, and pre-content events of this kernel on a plain file."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fanotify
from fanotify.wire import pack_response, parse_events

READER = (
    "import os, sys; sys.stdout.buffer.write(os.pread(os.open(sys.argv[1], 0), int(sys.argv[2]), int(sys.argv[3])))"
)


def event(
    info: bytes = b"", *, length: int | None = None, version: int = 3, metadata: int = 24, fd: int = 9, pid: int = 42
) -> bytes:
    size = 24 + len(info) if length is None else length
    return struct.pack("=IBBHQii", size, version, 0, metadata, 0x100000, fd, pid) + info


def range_info(offset: int = 8192, count: int = 4096, *, kind: int = 6, length: int = 24) -> bytes:
    return struct.pack("=BBHIQQ", kind, 0, length, 0, offset, count)


def test_events() -> None:
    other = struct.pack("=BBHI", 4, 0, 8, 0)
    data = event(range_info()) + event() + event(other + range_info(0, 0), fd=-24)
    assert list(parse_events(data)) == [
        (0x100000, 9, 42, 8192, 4096),
        (0x100000, 9, 42, None, None),
        (0x100000, -24, 42, 0, 0),
    ]


@pytest.mark.parametrize(
    "data",
    [
        event()[:23],
        event(length=23),
        event(length=25),
        event(version=2),
        event(metadata=23),
        event(metadata=25),
        event(b"abc"),
        event(range_info(length=3)),
        event(range_info(length=25)),
        event(range_info(length=16)),
        event(range_info()) + b"x",
    ],
)
def test_malformed_events(data: bytes) -> None:
    with pytest.raises(ValueError, match="fanotify"):
        list(parse_events(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_events_or_a_value_error(data: bytes) -> None:
    try:
        list(parse_events(data))
    except ValueError:
        pass


def test_responses() -> None:
    assert pack_response(9, 0) == struct.pack("=iI", 9, 1)
    assert pack_response(9, errno.EIO) == struct.pack("=iI", 9, 2 | 5 << 24)


@pytest.fixture
def group() -> Iterator[int]:
    fd = fanotify.init()
    yield fd
    os.close(fd)


def start_reader(path: Path, length: int, offset: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", READER, str(path), str(length), str(offset)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def next_event(group: int) -> fanotify.Event:
    assert select([group], [], [], 30)[0]
    (found,) = fanotify.read_events(group)
    return found


@pytest.mark.root
def test_a_reader_waits_for_the_answer(group: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 20)
    writer = os.open(path, os.O_RDWR)  # before the mark: its writes raise no events
    fanotify.mark(group, path)
    assert fanotify.read_events(group) == []
    with start_reader(path, 5000, 8192) as reader:
        found = next_event(group)
        assert found.mask & fanotify.PRE_ACCESS
        assert found.pid == reader.pid
        assert os.fstat(found.fd).st_ino == path.stat().st_ino
        assert found.offset is not None and found.length is not None
        assert found.offset <= 8192 and found.offset + found.length >= 13192
        os.pwrite(writer, b"x" * 5000, 8192)
        fanotify.answer(group, found.fd)
        os.close(found.fd)
        assert reader.communicate(timeout=30)[0] == b"x" * 5000
    os.close(writer)


@pytest.mark.root
def test_denial_and_unknown_numbers(group: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(bytes(65536))
    fanotify.mark(group, path)
    with start_reader(path, 100, 0) as reader:
        found = next_event(group)
        with pytest.raises(OSError) as caught:
            fanotify.answer(group, found.fd + 1, errno.EIO)
        assert caught.value.errno == errno.ENOENT
        fanotify.answer(group, found.fd, errno.ECONNRESET)  # not an errno that the kernel takes here
        os.close(found.fd)
        assert reader.wait(timeout=30) != 0


@pytest.mark.root
def test_marks_by_descriptor(group: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(b"y" * 4096)
    fd = os.open(path, os.O_RDWR)
    fanotify.mark_fd(group, fd)
    fanotify.unmark_fd(group, fd)
    with start_reader(path, 4096, 0) as reader:
        assert reader.communicate(timeout=30)[0] == b"y" * 4096
    with pytest.raises(OSError) as caught:
        fanotify.unmark_fd(group, fd)
    assert caught.value.errno == errno.ENOENT
    os.close(fd)


@pytest.mark.root
def test_file_systems_without_pre_content(group: int) -> None:
    with pytest.raises(OSError) as caught:
        fanotify.mark(group, "/proc/version")
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.EINVAL)
    assert caught.value.filename == "/proc/version"
