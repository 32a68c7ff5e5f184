"""/dev/cachefiles in on-demand mode: thin wrappers, one command per write(2), raising OSError(errno, text, path)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from cachefiles._kabi import lib
from cachefiles.wire import MSG_MAX_SIZE, Message, parse_message

DEVICE = Path("/dev/cachefiles")
LIMITS = ("brun", "bcull", "bstop", "frun", "fcull", "fstop")
BLOCK = 4096


def open_device(path: Path = DEVICE) -> int:
    """The device's descriptor. ENOENT, ENODEV: not in this kernel; EBUSY: another daemon, or what it left, has it."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def bind(device: int, directory: Path, tag: str, limits: Mapping[str, int] | None = None) -> None:
    """Bring the cache in `directory` up, on demand. Limits are percent of the file system, by the names in LIMITS.

    EOPNOTSUPP at "bind ondemand": CONFIG_CACHEFILES_ONDEMAND is off; at "dir": the file system cannot hold a cache.
    """
    command(device, f"dir {directory}")
    command(device, f"tag {tag}")
    for name, percent in (limits or {}).items():
        if name not in LIMITS:
            raise ValueError(f"no cachefiles limit {name!r}: one of {', '.join(LIMITS)}")
        command(device, f"{name} {percent}%")
    command(device, "bind ondemand")


def read_message(device: int) -> Message | None:
    """The next message, None when there is none. EIO: the cache is dead."""
    data = os.read(device, MSG_MAX_SIZE)
    return parse_message(data) if data else None


def copen(device: int, msg_id: int, size: int) -> None:
    """Answer an OPEN: the object's size in bytes, or -errno. EINVAL: withdrawn (the mount was killed)."""
    command(device, f"copen {msg_id},{size}")


def read_complete(fd: int, msg_id: int) -> None:
    """Answer a READ, on its own object's descriptor. EINVAL: withdrawn (the reader was killed)."""
    result = lib.eod_read_complete(fd, msg_id)
    if result < 0:
        raise OSError(-result, f"READ_COMPLETE {msg_id}: {os.strerror(-result)}", f"descriptor {fd}")


def restore(device: int) -> None:
    """Have every unanswered request come again. EOPNOTSUPP: the kernel is older than this command (6.8, and 6.1.y)."""
    command(device, "restore")


def cull(device: int, directory: Path, name: str) -> None:
    """Cull a cache file. The kernel looks `name` up in the caller's working directory: so single-threaded callers only.

    EBUSY: in use; ESTALE: gone.
    """
    _in_directory(device, directory, f"cull {name}")


def in_use(device: int, directory: Path, name: str) -> bool:
    """Whether the kernel has a cache file in use (same caveat as cull)."""
    try:
        _in_directory(device, directory, f"inuse {name}")
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def command(device: int, text: str) -> None:
    """Write one command; OSError names it."""
    try:
        os.write(device, os.fsencode(text))
    except OSError as error:
        raise OSError(error.errno, f"cachefiles: {text}: {error.strerror}", str(DEVICE)) from None


def _in_directory(device: int, directory: Path, text: str) -> None:
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        command(device, text)
    finally:
        os.fchdir(before)
        os.close(before)


class AlignedWriter:
    """A page-aligned buffer for writes to an object's descriptor: cachefiles writes O_DIRECT, which bytes cannot do.

    Offsets must be multiples of 4 KiB: 6.1 would silently write elsewhere. Not for two threads at once.
    """

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._buffer = mmap.mmap(-1, capacity + -capacity % BLOCK)

    def write(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`, zero-padded to whole blocks. OSError also on a short write."""
        if offset % BLOCK:
            raise ValueError(f"offset {offset} is not a multiple of {BLOCK}")
        view = memoryview(data).cast("B")
        capacity = len(self._buffer)
        for start in range(0, len(view), capacity):
            self._write_piece(fd, view[start : start + capacity], offset + start)

    def _write_piece(self, fd: int, piece: memoryview, offset: int) -> None:
        padded = len(piece) + -len(piece) % BLOCK
        self._buffer[: len(piece)] = piece
        self._buffer[len(piece) : padded] = bytes(padded - len(piece))
        with memoryview(self._buffer) as buffer:
            written = 0
            while written < padded:
                with buffer[written:padded] as rest:
                    count = os.pwrite(fd, rest, offset + written)
                if count <= 0 or count % BLOCK:
                    raise OSError(errno.EIO, f"short write: {count} of {padded - written} bytes at {offset + written}")
                written += count

    def close(self) -> None:
        self._buffer.close()
