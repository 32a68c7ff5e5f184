"""The rest of a blob of which a good part was read, in whatever order.

Whoever has read that much mostly goes on, and a cache file that is whole costs its readers nothing any more: the kernel
asks nobody about it. What is left comes in the order of the blob, in large ranges, as readers go on; and where the link
has no room for more, no more is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from erofs_builder.frames import FrameTable
from loader.cache.ready import ReadyMap

# Once a third was read, three times as much as is read comes with it: all is there once half was read. So no more comes
# in vain than was read, and that much only if readers stop just then. A start reads less than a third of an image.
SHARE = 1 / 3
PACE = 3
LARGEST_PIECE = 4 << 20  # bytes; and at most a sixteenth of the blob
UNDER_WAY = 2  # pieces
LOST = 8  # so many pieces' worth is read, and nothing of what is under way has come: it will not
PASSES = 3  # through the blob, for what was asked for and did not come


class Rest:
    """What is left of one blob. Not thread-safe."""

    def __init__(self, table: FrameTable) -> None:
        self._table = table
        whole = table.encoded_size_of(range(len(table)))
        self._least = SHARE * whole
        self._piece = min(whole // 16, LARGEST_PIECE)
        self._read = 0  # encoded bytes
        self._due = 0  # of what comes with them, what was not asked for yet
        self._waited = 0  # bytes read since a piece was asked for, or came
        self._under_way = deque[int]()  # the last frame of each piece that was asked for and has not come yet
        self._next = 0  # frames before it were asked for in this pass, or are there
        self._passes = 0

    def after(self, size: int, read: Container[int], ready: ReadyMap) -> list[int]:
        """So many encoded bytes are read for the first time, as `read` were: which frames to fetch."""
        self._read += size
        if self._read < self._least or self._passes == PASSES:
            return []
        self._due += PACE * size
        if not self._may_ask(size, ready):
            return []
        self._due = min(self._due, self._piece)
        asked = self._take(read, ready)
        if asked:
            self._under_way.append(asked[-1])
        return asked

    def _may_ask(self, size: int, ready: ReadyMap) -> bool:
        self._waited += size
        while self._under_way and (ready[self._under_way[0]] or self._waited >= LOST * self._piece):
            self._under_way.popleft()
            self._waited = 0
        return self._due >= self._piece and len(self._under_way) < UNDER_WAY

    def _take(self, read: Container[int], ready: ReadyMap) -> list[int]:
        """What is due, from where the last piece ended."""
        asked: list[int] = []
        while self._due > 0 and self._next < len(self._table):
            if self._next not in read and not ready[self._next]:
                asked.append(self._next)
                self._due -= self._table.frame_encoded_size(self._next)
            self._next += 1
        if self._next == len(self._table):
            self._next, self._passes = 0, self._passes + 1
        return asked
