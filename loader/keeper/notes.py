"""What the worker is told of READs that the keeper answered by itself.

A reader that goes straight on is told of in longer pieces: each note costs the worker more than the READ cost.
"""

from __future__ import annotations

from loader.keeper.protocol import pack_present
from loader.keeper.requests import Present

MOST = 1 << 20  # bytes of one note
HELD = 0.002  # seconds for which a note may wait for what follows


class Notes:
    """PRESENT packets, in the order of the READs."""

    def __init__(self) -> None:
        self._last = (0, 0)  # object and end of the last READ
        self._object = self._offset = self._length = self._count = 0

    @property
    def held(self) -> bool:
        """Whether something waits to be sent."""
        return self._count > 0

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
