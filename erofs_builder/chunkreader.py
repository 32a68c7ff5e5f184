"""Exact reads from a stream that comes in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from erofs_builder.errors import TarError
from erofs_builder.hot import SHA_BLOCK, Sha256, sha256_many


class ChunkReader:
    """Exact reads from an iterator of chunks, without a copy where a read lies within one chunk.

    `whole` takes in all that is read, once the end has been reached. `at` is the place in the current `chunk` of what
    comes next: a caller that knows what lies there passes over it itself, which is a walk's every other step.
    """

    def __init__(self, chunks: Iterator[bytes], whole: Sha256 | None = None) -> None:
        self._chunks = chunks
        self.chunk = b""
        self.at = 0
        self._view = memoryview(self.chunk)
        self.base = 0  # offset of the chunk in the stream
        self._whole = whole
        self._unhashed = self._view  # what `whole` has not taken in

    @property
    def offset(self) -> int:
        return self.base + self.at

    def take(self, size: int) -> memoryview:
        """The next `size` bytes; TarError if the stream ends before."""
        end = self.at + size
        if end <= len(self.chunk):
            view = self._view[self.at : end]
            self.at = end
            return view
        return self._gather(size)

    def _gather(self, size: int) -> memoryview:
        start, parts, missing = self.offset, [], size
        while missing:
            if self.at == len(self.chunk) and not self._next():
                raise TarError(f"tar: cut off: {size} bytes expected at offset {start}, {size - missing} there")
            part = self._view[self.at : self.at + missing]
            self.at += len(part)
            missing -= len(part)
            parts.append(part)
        return memoryview(b"".join(parts))

    def _next(self) -> bool:
        if self._whole is not None:
            self._whole.update(self._unhashed)
        chunk = next(self._chunks, b"")
        self.base += len(self.chunk)
        self.chunk, self.at = chunk, 0
        self._view = self._unhashed = memoryview(chunk)
        return bool(chunk)

    def sha256_many(self, data: bytes | bytearray | memoryview, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """The sha256 of parts of `data`, and beside it that of as much of the stream."""
        if self._whole is None:
            return sha256_many(data, places)
        size = sum(length for _, length in places) & -SHA_BLOCK
        part, self._unhashed = self._unhashed[:size], self._unhashed[size:]
        return self._whole.beside(part, data, places)

    def window(self) -> memoryview:
        """What is left of the current chunk, not consumed."""
        return self._view[self.at :]

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self.at == len(self.chunk) and not self._next()

    def skip(self, size: int) -> None:
        """Pass over `size` bytes; TarError if the stream ends before."""
        while size:
            if self.at == len(self.chunk) and not self._next():
                raise TarError(f"tar: cut off: {size} bytes more expected at offset {self.offset}")
            step = min(size, len(self.chunk) - self.at)
            self.at += step
            size -= step

    def peek(self, size: int) -> bytes:
        """Up to `size` bytes that the current chunk still holds, not consumed."""
        if self.at == len(self.chunk):
            self._next()
        return bytes(self._view[self.at : self.at + size])

    def drain(self) -> None:
        """Read what is left, so that whoever hashes the stream below has seen all of it."""
        while self._next():
            pass
        self.at = len(self.chunk)
