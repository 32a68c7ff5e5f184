"""Which blocks of an object its worker has filled: a bitmap in memory that both see, so that the keeper can answer by
itself what needs no fetch.

The keeper makes one per object and worker, all clear, and only ever reads it; the worker sets a bit after the block's
bytes were written, and clears it before they go away. Nobody can shrink it, so a worker cannot hurt its keeper by it.
"""

from __future__ import annotations

import fcntl
import mmap
import os

BLOCK = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(size: int) -> int:
    """A descriptor of a clear bitmap for `size` bytes."""
    fd = os.memfd_create("presence", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(1, -(-size // (8 * BLOCK))))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Presence:
    """One side's view of a bitmap. Changes are the caller's to order: they are not atomic."""

    def __init__(self, fd: int, *, writable: bool = False) -> None:
        """Map the bitmap of a descriptor, which stays the caller's."""
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)

    @property
    def memory(self) -> mmap.mmap:
        """The bitmap."""
        return self._map

    def has(self, offset: int, length: int) -> bool:
        """Whether all blocks under [offset, offset + length) are there; length > 0."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        bits = int.from_bytes(self._map[first >> 3 : (last >> 3) + 1], "little") >> (first & 7)
        wanted = (1 << (last - first + 1)) - 1
        return bits & wanted == wanted

    def set(self, offset: int, length: int) -> None:
        """The blocks under [offset, offset + length) are there."""
        self._change(offset, length, True)

    def clear(self, offset: int, length: int) -> None:
        """The blocks are about to go away."""
        self._change(offset, length, False)

    def _change(self, offset: int, length: int, present: bool) -> None:
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        start, stop = first >> 3, (last >> 3) + 1
        mask = ((1 << (last - first + 1)) - 1) << (first & 7)
        bits = int.from_bytes(self._map[start:stop], "little")
        changed = bits | mask if present else bits & ~mask
        self._map[start:stop] = changed.to_bytes(stop - start, "little")

    def close(self) -> None:
        self._map.close()
