"""What the worker is told of READs that the keeper answered by itself.

A reader that goes straight on is told of in longer pieces: each note costs the worker more than the READ cost.
"""

from __future__ import annotations

from loader.keeper.protocol import pack_present, pack_repeats
from loader.keeper.requests import Present, Repeats

MOST = 1 << 20  # bytes of one note
HELD = 0.002  # seconds for which a note may wait for what follows, or longer, with a count, while READs go on


class Notes:
    """PRESENT packets, in the order of the READs, and now and then a count of all others."""

    def __init__(self) -> None:
        self._last = (0, 0)  # object and end of the last READ
        self._object = self._offset = self._length = self._count = 0
        self._repeats = self._repeated = 0  # READs and bytes that were not told of

    @property
    def held(self) -> bool:
        """Whether a READ waits to be told of, before any that comes later."""
        return self._count > 0

    @property
    def waits(self) -> bool:
        """Whether anything does."""
        return self._count > 0 or self._repeats > 0

    def repeat(self, repeats: Repeats) -> None:
        """Count READs that the worker need not be told of."""
        self._repeats += repeats.number
        self._repeated += repeats.length

    def add(self, present: Present) -> list[bytes]:
        """The packets that are to be sent now."""
        goes_on = self._last == (present.object, present.offset)
        self._last = present.object, present.offset + present.length
        if not goes_on:
            return [*self.take(), pack_present(1, *present)]
        if not self._count:
            self._object, self._offset, self._length = present.object, present.offset, 0
        self._length += present.length
        self._count += 1
        return self.take() if self._length >= MOST else []

    def take(self) -> list[bytes]:
        """The packet that was held, if there is one."""
        if not self._count:
            return []
        packet = pack_present(self._count, self._object, self._offset, self._length)
        self._count = 0
        return [packet]

    def take_all(self) -> list[bytes]:
        """That, and the count."""
        packets = self.take()
        if self._repeats:
            packets.append(pack_repeats(self._repeats, self._repeated))
            self._repeats = self._repeated = 0
        return packets
