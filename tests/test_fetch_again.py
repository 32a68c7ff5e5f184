"""A frame that is asked for in the words that got another one: whatever comes of it, each READ has one answer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.files import CacheFile
from loader.registry.again import Taken
from loader.worker.counters import Counters
from loader.worker.fetcher import Fetcher
from loader.worker.link_estimate import LinkEstimate
from loader.worker.outages import Outages
from loader.worker.sources import Sources
from tests.support.cache_files import MemorySource, open_file, sample

Take = Callable[[memoryview, int, int], Taken | None]


class _Asked:
    """An answer that is what `take` makes of the right bytes, a descriptor and a place in it."""

    def __init__(self, data: bytes, take: Take) -> None:
        self._data, self._take = data, take

    def take(self, digest: bytes, file: int = -1, place: int = 0) -> Taken | None:
        return self._take(memoryview(self._data), file, place)

    def resume(self) -> None:
        return None


class _Sources(Sources):
    take: Take
    data: bytes
    forgotten = 0

    def ask_again(self, source: str, blob: Digest, offset: int, length: int) -> _Asked:  # type: ignore[override]
        return _Asked(self.data[offset : offset + length], self.take)

    def forget_words(self, source: str, blob: Digest) -> None:
        self.forgotten += 1


class Rig:
    def __init__(self, root: Path, form: Form) -> None:
        blob = sample()
        self.file: CacheFile = open_file(root, blob, form)
        self.whole = bytes(blob.decoded if form is Form.DECODED else blob.encoded)
        self.source = MemorySource({self.file.blob: bytes(blob.encoded)})
        self.sources = _Sources({"source": self.source}.__getitem__)
        self.sources.data = bytes(blob.encoded)
        self.sources.add("source", [self.file.blob])
        self.counters, self.flights = Counters(), FlightTable(1, 1, (1, 1, 1))
        self.fetcher = Fetcher(self.flights, self.sources, self.counters, LinkEstimate(), lambda size: 0, Outages(20.0))
        self.answers: list[int] = []
        self.sent = 0

    def fetch(self, take: Take) -> None:
        """Fetch frame 1, until somebody has an answer."""
        self.sources.take = take
        self.flights.want(self.file, [1], Priority.DEMAND, Waiter(self.answers.append, float("inf")))
        while not self.answers:
            run = self.flights.take()
            assert run is not None
            self.fetcher.fetch(run, self._sent)

    def _sent(self) -> None:
        assert not self.answers
        self.sent += 1

    def is_right(self) -> bool:
        offset, size = self.file.place(self.file.table[1])
        assert self.file.writer is not None
        with self.file.writer.descriptor() as fd:
            return self.file.ready[1] and os.pread(fd, size, offset) == self.whole[offset : offset + size]


@pytest.fixture(params=list(Form))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(tmp_path, request.param)


def _written(data: memoryview, file: int, place: int) -> Taken:
    if file >= 0:
        os.pwrite(file, data, place)
    return Taken(data, True, file >= 0, 0.0)


def test_what_c_has_written_is_ready(rig: Rig) -> None:
    rig.fetch(_written)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and not rig.source.ranges
    assert rig.counters.get("frames_demanded") == rig.counters.get("fetches") == 1


def test_what_it_has_not_written_is_written_here(rig: Rig) -> None:
    rig.fetch(lambda data, file, place: Taken(data, True, False, 0.0))
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right()


def test_no_room_to_say_that_it_is_there(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: all is written once more, as for any frame."""
    full, ready_set = [OSError(errno.ENOSPC, "full")], rig.file.ready.set

    def set_ready(frame: int) -> None:
        if full:
            raise full.pop()
        ready_set(frame)

    monkeypatch.setattr(rig.file.ready, "set", set_ready)
    rig.fetch(_written)
    assert rig.answers == [0] and rig.is_right()


def test_wrong_bytes_are_judged_as_all_are(rig: Rig) -> None:
    def once_wrong(data: memoryview, file: int, place: int) -> Taken | None:
        rig.sources.take = lambda *_: None
        return Taken(memoryview(bytes(len(data))), False, False, 0.0)

    rig.fetch(once_wrong)
    assert rig.answers == [0] and rig.is_right() and rig.counters.get("corrupt_frames") == 1
    assert rig.source.ranges and rig.sources.forgotten


def test_what_is_odd_is_asked_for_in_the_ordinary_way(rig: Rig) -> None:
    rig.fetch(lambda *_: None)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and len(rig.source.ranges) == 1
    assert rig.sources.forgotten == 1
