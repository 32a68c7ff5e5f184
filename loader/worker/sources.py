"""Where a blob can be fetched from: the repositories of all images that hold it, the healthy ones first."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Self

from erofs_builder.digest import Digest
from loader.errors import NotFoundError
from loader.registry.again import Again, Asked
from loader.registry.base import ImageSource
from loader.registry.client import Registry
from loader.registry.streams import Readable, read_exactly

_MOST_AGAIN = 1024
PENALTY = 10.0  # seconds for which a source that failed comes last


class RangeStream:
    """The bytes of a range in order; to be closed by the thread that opened it."""

    def __init__(self, stream: Readable, what: str, broke: Callable[[], None]) -> None:
        self._stream, self._what, self._broke = stream, what, broke

    def read(self, length: int) -> bytes:
        """Exactly the next `length` bytes; a failure is remembered against the source."""
        try:
            return read_exactly(self._stream, length, self._what)
        except Exception:
            self._broke()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


class Sources:
    """Repositories by name, opened when first needed and kept with their connections. Thread-safe."""

    def __init__(self, open_source: Callable[[str], ImageSource]) -> None:
        self._open_source = open_source
        self._lock = threading.Lock()
        self._by_blob: dict[Digest, list[str]] = {}
        self._opened: dict[str, ImageSource] = {}
        self._failed: dict[str, float] = {}
        self._again: dict[tuple[str, Digest], tuple[Registry, Again]] = {}

    def add(self, source: str, blobs: Iterable[Digest]) -> None:
        """`source` (a repository, as `open_image` takes it) holds these blobs."""
        with self._lock:
            for blob in blobs:
                known = self._by_blob.setdefault(blob, [])
                if source not in known:
                    known.append(source)

    def clear(self) -> None:
        """Forget which source holds what (it is about to be told anew)."""
        with self._lock:
            self._by_blob = {}

    def count(self, blob: Digest) -> int:
        return len(self._by_blob.get(blob, ()))

    def places(self, blob: Digest) -> int:
        """How many servers can be asked for a blob, mirrors included; at least 1."""
        opened = [self._opened.get(source) for source in self._by_blob.get(blob, ())]
        return max(1, sum(source.places if isinstance(source, Registry) else 1 for source in opened))

    def names(self, blob: Digest) -> list[str]:
        """The sources of a blob."""
        return list(self._by_blob.get(blob, ()))

    def choose(self, blob: Digest) -> str | None:
        """The source to ask next: one that did not fail lately, else the one whose failure is longest ago; or None."""
        with self._lock:
            recent = time.monotonic() - PENALTY
            failed = {source: at for source, at in self._failed.items() if at > recent}
            return min(self._by_blob.get(blob, ()), key=lambda source: failed.get(source, 0.0), default=None)

    def blame(self, source: str) -> None:
        """What the source sent was wrong."""
        with self._lock:
            self._failed[source] = time.monotonic()
            for key in [key for key in self._again if key[0] == source]:
                del self._again[key]

    def open(self, source: str) -> ImageSource:
        """The opened repository; raises what opening raises."""
        with self._lock:
            opened = self._opened.get(source)
        if opened is None:
            fresh = self._open_source(source)
            with self._lock:
                opened = self._opened.setdefault(source, fresh)
            if opened is not fresh:
                fresh.close()
        return opened

    def open_range(self, source: str, blob: Digest, offset: int, length: int) -> RangeStream:
        """A range of a blob as a stream, unverified; a failure is remembered against the source."""
        try:
            opened = self.open(source)
            if isinstance(opened, Registry):
                stream: Readable = opened.open_range(blob, offset, length)
                if again := opened.again(stream, blob):
                    self._remember(source, blob, opened, again)
            else:
                data = opened.read_range(blob, offset, length)
                if len(data) != length:
                    raise NotFoundError(f"{source}: {len(data)} bytes of {blob} at {offset}, expected {length}")
                stream = io.BytesIO(data)
        except Exception:
            self.blame(source)
            raise
        return self.stream(source, blob, offset, stream)

    def _remember(self, source: str, blob: Digest, opened: Registry, again: Again) -> None:
        with self._lock:
            if len(self._again) >= _MOST_AGAIN:
                self._again.clear()
            self._again[source, blob] = opened, again

    def ask_again(self, source: str, blob: Digest, offset: int, length: int) -> Asked | None:
        """Ask for a range in the words that have just got another one; None: in the ordinary way, please."""
        known = self._again.get((source, blob))
        if known is None or not known[1].fresh:
            return None
        opened, again = known
        asked = again.ask(offset, length)
        if asked is not None:
            opened.answers(again)
        return asked

    def forget_words(self, source: str, blob: Digest) -> None:
        """They do not do any more: the next one is to be asked for in the ordinary way."""
        with self._lock:
            self._again.pop((source, blob), None)

    def stream(self, source: str, blob: Digest, offset: int, response: Readable) -> RangeStream:
        """An answer to `ask_again` as a stream; a failure is remembered against the source."""
        return RangeStream(response, f"{source}: {blob} from {offset}", partial(self._broke, source))

    def _broke(self, source: str) -> None:
        self.blame(source)
        opened = self._opened.get(source)
        if isinstance(opened, Registry):
            opened.broke()

    def distrust(self, source: str, blob: Digest) -> None:
        """What this thread read of a blob last was wrong: a repository with mirrors asks another one from now on."""
        self.forget_words(source, blob)
        opened = self._opened.get(source)
        if isinstance(opened, Registry):
            opened.distrust(blob)

    def close(self) -> None:
        with self._lock:
            opened, self._opened = list(self._opened.values()), {}
            self._again = {}
        for source in opened:
            source.close()
