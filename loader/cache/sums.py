"""Checksums of what was written into a decoded file, for `scrub`.

The kernel checks each frame of an encoded file by itself, and the frame table has its digest. Of decoded bytes nobody
has one, so the worker keeps a CRC-32 of each frame that it writes: 8 bytes a frame, the CRC plus one, zero if unknown.
Not synced: after a crash a sum may be missing or old, and then the frame counts as damaged and is fetched again.
The file is read through a map and changed by writes: on a full disk a store into a map would end the process.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from pathlib import Path

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine: the same sums, at a tenth of the speed
    from zlib import crc32

_ENTRY = struct.Struct("<Q")


class Sums:
    """The sums of one file. A frame's sum is written before its bit is set, by whoever wrote the frame."""

    def __init__(self, directory: Path, frames: int) -> None:
        size = max(1, frames) * _ENTRY.size
        self._fd = os.open(directory / "sums", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._lock = threading.Lock()
        try:
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, size)
            self._map: mmap.mmap | bytes = mmap.mmap(self._fd, size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise

    def set(self, frame: int, data: bytes | memoryview) -> None:
        """Remember the sum of a frame's bytes. OSError: there is no room for it."""
        entry = _ENTRY.pack(crc32(data) + 1)
        with self._lock:
            if isinstance(self._map, mmap.mmap):
                os.pwrite(self._fd, entry, frame * _ENTRY.size)

    def fits(self, frame: int, data: bytes) -> bool:
        """Whether these are the bytes that were written. False if nothing is known of the frame."""
        (known,) = _ENTRY.unpack_from(self._map, frame * _ENTRY.size)
        return bool(known == crc32(data) + 1)

    def close(self) -> None:
        """Give the file back. Who still holds the sums sees what they were, and changes nothing any more."""
        with self._lock:
            mapped, self._map = self._map, bytes(self._map)
            if isinstance(mapped, mmap.mmap):
                mapped.close()
                os.close(self._fd)
