"""The journal of events that were read but not answered: a memfd, so that a keeper's SIGKILL does not lose them.

The kernel knows an event by the number that its descriptor had in the process that read it. A keeper that takes over
can still answer by that number, if it knows which event it was. Slot = descriptor number:

    header   u64 high (1 + the largest number ever used)
    slot     u64 object + 1 (0: free), u64 offset, u64 length, u64 thread

A slot's object is written last and cleared first; the number stays taken until after that, so a slot that is filled
never names two events.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

CAPACITY = 65536
_HEADER = struct.Struct("=Q")
_SLOT = struct.Struct("=QQQQ")
_OBJECT = struct.Struct("=Q")
_START = 4096
SIZE = _START + CAPACITY * _SLOT.size


class Entry(NamedTuple):
    """An unanswered event: the number of its descriptor, what it asked for, and which thread waits."""

    fd: int
    object: int
    offset: int
    length: int
    thread: int = 0


class Journal:
    """A view of the journal in a memfd, which `fd` names and the caller keeps."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != SIZE:
            raise ValueError(f"journal of {os.fstat(fd).st_size} bytes, expected {SIZE}")
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)

    @classmethod
    def create(cls) -> Journal:
        fd = os.memfd_create("erofs-loader-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @property
    def memory(self) -> mmap.mmap:
        """The journal as it lies in memory."""
        return self._map

    @property
    def high(self) -> int:
        """1 + the largest descriptor number that was ever recorded."""
        return min(int(_HEADER.unpack_from(self._map)[0]), CAPACITY)

    def add(self, entry: Entry) -> None:
        if not 0 <= entry.fd < CAPACITY:
            raise ValueError(f"descriptor {entry.fd} is beyond the journal's {CAPACITY}")
        if entry.fd >= self.high:
            _HEADER.pack_into(self._map, 0, entry.fd + 1)
        position = _START + entry.fd * _SLOT.size
        _SLOT.pack_into(self._map, position, 0, entry.offset, entry.length, max(0, entry.thread))
        _OBJECT.pack_into(self._map, position, entry.object + 1)

    def clear(self, fd: int) -> None:
        _OBJECT.pack_into(self._map, _START + fd * _SLOT.size, 0)

    def entries(self) -> Iterator[Entry]:
        for fd in range(self.high):
            marker, offset, length, thread = _SLOT.unpack_from(self._map, _START + fd * _SLOT.size)
            if marker:
                yield Entry(fd, marker - 1, offset, length, thread)

    def close(self) -> None:
        self._map.close()
