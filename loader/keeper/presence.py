"""Which blocks of an object its worker has filled: a bitmap in memory that both see, so that the keeper can answer by
itself what needs no fetch. Behind it a second one: which blocks the worker knows to be read, so that it need not be
told of each READ there: a frame holds many small files.

The keeper makes them per object and worker, all clear, and only ever reads them; the worker sets a bit of the first
after the block's bytes were written, and clears it before they go away. Nobody can shrink them, so a worker cannot hurt
its keeper by them: of the second one nothing depends but what it is told itself.

A last word says that there are two. A keeper of before, which runs on when its worker is replaced by a newer one, gives
one bitmap without it.
"""

from __future__ import annotations

import fcntl
import mmap
import os

BLOCK = 4096
_TWO = b"EROFSPM2"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(size: int) -> int:
    """A descriptor of clear bitmaps for `size` bytes."""
    fd = os.memfd_create("presence", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        half = max(1, -(-size // (8 * BLOCK)))
        os.ftruncate(fd, 2 * half)
        os.pwrite(fd, _TWO, 2 * half)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Presence:
    """One side's view of the bitmaps. Changes are the caller's to order: they are not atomic."""

    def __init__(self, fd: int, *, writable: bool = False) -> None:
        """Map the bitmaps of a descriptor, which stays the caller's."""
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        two = self._map[-len(_TWO) :] == _TWO
        self.half = (len(self._map) - len(_TWO)) // 2 if two else len(self._map)  # bytes of one bitmap
        self._two = two

    @property
    def memory(self) -> mmap.mmap:
        """All of it: the bitmaps, one behind the other."""
        return self._map

    def has(self, offset: int, length: int) -> bool:
        """Whether all blocks under [offset, offset + length) are there; length > 0."""
        return self._all(0, offset, length)

    def knows(self, offset: int, length: int) -> bool:
        """Whether the worker knows that all of them are read."""
        return self._two and self._all(self.half, offset, length)

    def set(self, offset: int, length: int) -> None:
        """The blocks under [offset, offset + length) are there."""
        self._change(0, offset, length, True)

    def clear(self, offset: int, length: int) -> None:
        """The blocks are about to go away."""
        self._change(0, offset, length, False)

    def know(self, offset: int, length: int) -> None:
        """The blocks under [offset, offset + length) are read, as the worker knows."""
        if self._two:
            self._change(self.half, offset, length, True)

    def forget_known(self) -> None:
        """The worker is to be told of all READs again."""
        if self._two:
            self._map[self.half : 2 * self.half] = bytes(self.half)

    def _all(self, base: int, offset: int, length: int) -> bool:
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if last >> 3 >= self.half:
            return False
        bits = int.from_bytes(self._map[base + (first >> 3) : base + (last >> 3) + 1], "little") >> (first & 7)
        wanted = (1 << (last - first + 1)) - 1
        return bits & wanted == wanted

    def _change(self, base: int, offset: int, length: int, value: bool) -> None:
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if last >> 3 >= self.half:
            raise IndexError(f"blocks up to {last} in bitmaps of {self.half} bytes")
        start, stop = base + (first >> 3), base + (last >> 3) + 1
        mask = ((1 << (last - first + 1)) - 1) << (first & 7)
        bits = int.from_bytes(self._map[start:stop], "little")
        changed = bits | mask if value else bits & ~mask
        self._map[start:stop] = changed.to_bytes(stop - start, "little")

    def close(self) -> None:
        self._map.close()
