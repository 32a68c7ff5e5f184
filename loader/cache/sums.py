"""Checksums of what was written into a decoded file, for `scrub`.

The kernel checks each frame of an encoded file by itself, and the frame table has its digest. Of decoded bytes nobody
has one, so the worker keeps a CRC-32 of each frame that it writes: 8 bytes a frame, the CRC plus one, zero if unknown.
Not synced: after a crash a sum may be missing or old, and then the frame counts as damaged and is fetched again.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path

_ENTRY = struct.Struct("<Q")


class Sums:
    """The sums of one file. A frame's sum is written before its bit is set, by whoever wrote the frame."""

    def __init__(self, directory: Path, frames: int) -> None:
        size = max(1, frames) * _ENTRY.size
        fd = os.open(directory / "sums", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
            self._map: mmap.mmap | bytearray = mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def set(self, frame: int, data: bytes | memoryview) -> None:
        """Remember the sum of a frame's bytes."""
        _ENTRY.pack_into(self._map, frame * _ENTRY.size, zlib.crc32(data) + 1)

    def fits(self, frame: int, data: bytes) -> bool:
        """Whether these are the bytes that were written. False if nothing is known of the frame."""
        (known,) = _ENTRY.unpack_from(self._map, frame * _ENTRY.size)
        return bool(known == zlib.crc32(data) + 1)

    def close(self) -> None:
        """Give the file back. Who still holds the sums sees what they were, and changes nothing any more."""
        mapped, self._map = self._map, bytearray(self._map)
        if isinstance(mapped, mmap.mmap):
            mapped.close()
