"""The rest of a blob of which a good part was read, in whatever order.

Whoever has read that much mostly goes on, and a cache file that is whole costs its readers nothing any more: the kernel
asks nobody about it. What is left comes in the order of the blob, in large ranges, and no faster than readers go on:
where they stop, it stops.
"""

from __future__ import annotations

from collections.abc import Container

from erofs_builder.frames import FrameTable
from loader.cache.ready import ReadyMap

# Once a third was read, three times as much as is read comes with it: all is there once half was read. So no more ever
# comes in vain than was read, and that much only if they stop just then. A start reads less than a third of an image.
SHARE = 1 / 3
PACE = 3
MOST_AT_ONCE = 4 << 20  # bytes; and at most a sixteenth of the blob


class Rest:
    """What is left of one blob. Not thread-safe."""

    def __init__(self, table: FrameTable) -> None:
        self._table = table
        whole = table.encoded_size_of(range(len(table)))
        self._least = SHARE * whole
        self._piece = min(whole // 16, MOST_AT_ONCE)
        self._read = 0  # encoded bytes
        self._due = 0  # of what comes with them, what was not asked for yet
        self._next = 0  # frames before it are there, or were asked for

    def after(self, size: int, read: Container[int], ready: ReadyMap) -> list[int]:
        """So many encoded bytes are read for the first time, as `read` were: which frames to fetch."""
        self._read += size
        if self._read < self._least:
            return []
        self._due += PACE * size
        if self._due < self._piece:
            return []
        asked: list[int] = []
        while self._due > 0 and self._next < len(self._table):
            if self._next not in read and not ready[self._next]:
                asked.append(self._next)
                self._due -= self._table.frame_encoded_size(self._next)
            self._next += 1
        return asked
