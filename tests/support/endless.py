"""Layers of any length, made while they are read."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator

_NOISE = random.Random(7).randbytes(4 << 20)


class Files:
    """A tar stream of `count` files of `size` bytes each, a hundred to a directory, half of them compressible."""

    def __init__(self, count: int, size: int) -> None:
        self._parts = _joined(_parts(count, size))

    def read(self, size: int, /) -> bytes:
        return next(self._parts, b"")


class Counted:
    """An output that forgets what it gets."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes, /) -> int:
        self.size += len(data)
        return len(data)


def _parts(count: int, size: int) -> Iterator[bytes]:
    for number in range(count):
        entry = tarfile.TarInfo(f"usr/share/directory-{number // 100}/file-{number}.bin")
        entry.size, entry.mtime = size, 1_700_000_000 + number
        yield entry.tobuf(tarfile.USTAR_FORMAT)
        for at in range(0, size, 1 << 20):
            length = min(size - at, 1 << 20)
            start = (number * 7919 + at * 31) % (len(_NOISE) - length)
            yield _NOISE[start : start + length] if number % 2 else (b"%d %d\n" % (number, at)).ljust(length, b".")
        yield bytes(-size % 512)
    yield bytes(1024)


def _joined(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of about 1 MiB."""
    chunk = bytearray()
    for part in parts:
        chunk += part
        if len(chunk) >= 1 << 20:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk)
