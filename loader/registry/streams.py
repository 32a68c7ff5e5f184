"""Streams that check what passes through them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from erofs_builder.digest import Digest
from erofs_builder.errors import IntegrityError
from erofs_builder.hot import Sha256
from loader.errors import TransientRegistryError
from loader.registry.patience import ATTEMPTS, pause

CHUNK = 1 << 20


class Readable(Protocol):
    """What a checked stream reads from."""

    def read(self, amount: int, /) -> bytes: ...

    def close(self) -> None: ...


class _Failed:
    """Stands for a stream that could not be opened."""

    def __init__(self, error: TransientRegistryError) -> None:
        self._error = error

    def read(self, amount: int, /) -> bytes:
        raise self._error

    def close(self) -> None:
        """Nothing is open."""


class VerifyingReader(io.RawIOBase):
    """Passes a blob's bytes on; its end is IntegrityError if they were not of the digest or longer than the size.

    `reopen(position)` gives the rest of the blob after the source broke off; it is asked a few times
    in a row, so that one lost connection does not throw a large download away.
    """

    def __init__(
        self,
        raw: Readable,
        digest: Digest,
        size: int,
        what: str,
        reopen: Callable[[int], Readable] | None = None,
    ) -> None:
        self._raw = raw
        self._digest = digest
        self._size = size
        self._what = what
        self._reopen = reopen
        self._hash: Sha256 | None = Sha256()
        self._position = 0
        self._failures = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(min(len(view), CHUNK))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = CHUNK, /) -> bytes:
        """1 to `size` bytes, none at the end; without the copies of a buffered stream."""
        data = self._next(min(size, CHUNK) if size >= 0 else CHUNK)
        if not data:
            self._check_end()
            return b""
        self._failures = 0
        if self._hash is not None:
            self._hash.update(data)
        self._position += len(data)
        if self._position > self._size:
            raise IntegrityError(f"{self._what}: longer than the {self._size} bytes of its descriptor")
        return data

    def readall(self) -> bytes:
        """All that is left, as a buffered stream asks for it."""
        return b"".join(iter(self.read, b""))

    def _next(self, amount: int) -> bytes:
        while True:
            try:
                data = self._raw.read(amount)
                if data or self._position >= self._size:
                    return data
                raise TransientRegistryError(f"{self._what}: ended after {self._position} of {self._size} bytes")
            except TransientRegistryError as error:
                self._failures += 1
                if self._reopen is None or self._failures >= ATTEMPTS:
                    raise
                pause(self._failures - 1, error)
                self._go_on(self._reopen)

    def _go_on(self, reopen: Callable[[int], Readable]) -> None:
        self._raw.close()
        try:
            self._raw = reopen(self._position)
        except TransientRegistryError as error:
            self._raw = _Failed(error)  # counts as one more failure

    def leave_digest(self) -> None:
        """Whoever reads compares the digest, which costs less beside others: the end is no error any more."""
        self._hash = None

    def _check_end(self) -> None:
        if self._hash is None:
            return
        found = Digest(self._hash.digest())
        if found != self._digest:
            raise IntegrityError(f"{self._what}: expected {self._digest}, got {found} ({self._position} bytes)")

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def verified_stream(
    raw: Readable,
    digest: Digest,
    size: int,
    what: str,
    reopen: Callable[[int], Readable] | None = None,
) -> BinaryIO:
    """A buffered `VerifyingReader`."""
    return io.BufferedReader(VerifyingReader(raw, digest, size, what, reopen), CHUNK)


def read_exactly(stream: Readable, length: int, what: str) -> bytes:
    """Exactly `length` bytes; TransientRegistryError if the stream ends before."""
    data = stream.read(length)
    if len(data) == length:
        return data
    parts = [data]
    missing = length - len(data)
    while missing:
        data = stream.read(missing)
        if not data:
            raise TransientRegistryError(f"{what}: ended {missing} bytes short of {length}")
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
