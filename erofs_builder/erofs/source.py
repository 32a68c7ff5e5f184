"""Bounded access to EROFS bytes that may be hostile: every read is checked, and no byte is charged for twice.

In a well-formed image every byte of metadata belongs to one inode, so all that a reader takes in adds up to at most the
image's size. A reader that charges for each piece therefore cannot be made to do more work, or hold more, than that.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from erofs_builder.errors import ErofsError


class Source:
    """The bytes of an image and the budget of what may still be read of them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._budget = len(data)

    def __len__(self) -> int:
        return len(self._data)

    def peek(self, offset: int, size: int, what: str) -> bytes:
        """Bytes at an offset; ErofsError, naming `what`, if they are not all there."""
        if offset < 0 or size < 0 or offset + size > len(self._data):
            raise ErofsError(f"{what}: {size} bytes at {offset} are outside the image of {len(self._data)}")
        return self._data[offset : offset + size]

    def take(self, offset: int, size: int, what: str) -> bytes:
        """Like `peek`, and charge for it."""
        data = self.peek(offset, size, what)
        self._budget -= size
        if self._budget < 0:
            raise ErofsError(f"{what}: parts of the image overlap")
        return data

    def unpack(self, struct: Struct, offset: int, what: str) -> tuple[Any, ...]:
        """One structure at an offset, not charged for."""
        return struct.unpack(self.peek(offset, struct.size, what))
