"""Writing frames into cache files: whole or not at all, buffered or O_DIRECT."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ALIGNMENT = 4096
_PUNCH_HOLE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Writer:
    """Puts bytes into a cache file. Owns its descriptor: it is closed once `close` was called and no write goes on.

    (A thread that writes through a number that another has closed could hit a file that was opened since.)
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 1  # ourselves, until `close`
        self._owned = True

    buffered = False  # whether pwrite(2) of its `descriptor` does it too

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of it; OSError (ENOSPC, EDQUOT, EBADF after close, …) otherwise."""
        raise NotImplementedError

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, held open meanwhile."""
        with self._lock:
            if not self._owned:
                raise OSError(errno.EBADF, "the cache file was closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            self._leave()

    def close(self) -> None:
        with self._lock:
            owned, self._owned = self._owned, False
        if owned:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            os.close(self._fd)


class BufferedWriter(Writer):
    """For files on an ordinary file system, through a descriptor that was opened before the file was marked."""

    buffered = True

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with self.descriptor() as fd:
            _write_all(fd, offset, memoryview(data))

    def punch(self, offset: int, length: int) -> None:
        """Give the blocks under [offset, offset + length) back; whoever reads there asks first. OSError if it fails."""
        with self.descriptor() as fd:
            if _fallocate(fd, _PUNCH_HOLE, offset, length):
                raise OSError(ctypes.get_errno(), "cannot punch a hole")


class DirectWriter(Writer):
    """For cachefiles' anonymous descriptors: the kernel writes with O_DIRECT, from a page-aligned buffer.

    Offset and length must be multiples of 4 KiB: some kernels round an odd offset down and put the data in a wrong
    place, so it is checked here.
    """

    _buffers = threading.local()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        length = len(data)
        if offset % ALIGNMENT or length % ALIGNMENT:
            raise ValueError(f"unaligned write of {length} bytes at {offset} into a cachefiles object")
        buffer = self._buffer(length)
        buffer[:length] = data
        with self.descriptor() as fd, memoryview(buffer) as view:
            _write_all(fd, offset, view[:length])

    def _buffer(self, length: int) -> mmap.mmap:
        buffer: mmap.mmap | None = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = mmap.mmap(-1, max(1 << 20, length))  # anonymous mappings are page-aligned
            self._buffers.buffer = buffer
        return buffer


def _write_all(fd: int, offset: int, view: memoryview) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        if written <= 0:
            raise OSError(errno.EIO, f"wrote {written} of {len(view)} bytes at {offset}")
        view, offset = view[written:], offset + written
