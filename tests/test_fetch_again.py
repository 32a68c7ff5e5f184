"""A frame that is asked for in the words that got another one: whatever comes of it, each READ has one answer."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard

from erofs_builder.digest import Digest
from erofs_builder.frames import Frame
from erofs_builder.payload import Form
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.files import CacheFile
from loader.cache.sums import Sums
from loader.registry.again import Taken
from loader.worker.counters import Counters
from loader.worker.fetcher import Fetcher
from loader.worker.link_estimate import LinkEstimate
from loader.worker.outages import Outages
from loader.worker.sources import Sources
from tests.support.cache_files import MemorySource, open_file, sample

Take = Callable[[memoryview, int, int], Taken | None]


class _Asked:
    """An answer that is what `take` makes of each frame's right bytes, a descriptor and a place in it."""

    def __init__(self, sources: _Sources, offset: int, length: int) -> None:
        self._sources = sources
        self._offset, self._end = offset, offset + length
        self.began: float | None = None

    def take(self, frame: Frame, decode: bool = False, file: int = -1) -> Taken | None:
        assert frame.encoded_offset == self._offset  # one after another
        encoded = self._sources.data[frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        data = zstandard.decompress(encoded) if decode else encoded
        taken = self._sources.take(memoryview(data), file, frame.decoded_offset if decode else frame.encoded_offset)
        if taken is not None:
            self._offset += frame.encoded_size
        return taken

    def resume(self) -> io.BytesIO | None:
        if self._sources.resumed is None:
            return None
        return io.BytesIO(self._sources.data[self._offset : self._end][: self._sources.resumed])

    def close(self) -> None:
        self._sources.closed += 1


class _Sources(Sources):
    take: Take
    data: bytes
    forgotten = closed = 0
    resumed: int | None = None  # bytes that come yet of what is not taken

    def ask_again(self, source: str, blob: Digest, offset: int, length: int) -> _Asked:  # type: ignore[override]
        return _Asked(self, offset, length)

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
        self.counters, self.flights = Counters(), FlightTable(1, 1, (1 << 20, 1, 1))
        self.fetcher = Fetcher(self.flights, self.sources, self.counters, LinkEstimate(), lambda size: 0, Outages(20.0))
        self.answers: list[int] = []
        self.sent = 0

    def fetch(self, take: Take, frames: Sequence[int] = (1,)) -> None:
        """Fetch frame 1, or a run of others, until somebody has an answer."""
        self.sources.take, self.frames = take, frames
        self.flights.want(self.file, frames, Priority.DEMAND, Waiter(self.answers.append, float("inf")))
        while not self.answers:
            run = self.flights.take()
            assert run is not None
            self.fetcher.fetch(run, self._sent)

    def _sent(self) -> None:
        assert not self.answers
        self.sent += 1

    def is_right(self) -> bool:
        return all(self._is_right(frame) for frame in self.frames)

    def _is_right(self, frame: int) -> bool:
        offset, size = self.file.place(self.file.table[frame])
        assert self.file.writer is not None
        with self.file.writer.descriptor() as fd:
            return self.file.ready[frame] and os.pread(fd, size, offset) == self.whole[offset : offset + size]


@pytest.fixture(params=list(Form))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(tmp_path, request.param)


def _written(data: memoryview, file: int, place: int) -> Taken:
    if file >= 0:
        os.pwrite(file, data, place)
    return Taken(data, True, file >= 0, 0.0, 0.0)


def test_what_c_has_written_is_ready(rig: Rig) -> None:
    rig.fetch(_written)
    assert rig.answers == [0] and rig.sent == rig.sources.closed == 1 and rig.is_right() and not rig.source.ranges
    assert rig.counters.get("frames_demanded") == rig.counters.get("fetches") == 1


def test_what_it_has_not_written_is_written_here(rig: Rig) -> None:
    rig.fetch(lambda data, file, place: Taken(data, True, False, 0.0, 0.0))
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
        return Taken(memoryview(bytes(len(data))), False, False, 0.0, 0.0)

    rig.fetch(once_wrong)
    assert rig.answers == [0] and rig.is_right() and rig.counters.get("corrupt_frames") == 1
    assert rig.source.ranges and rig.sources.forgotten


def test_what_is_odd_is_asked_for_in_the_ordinary_way(rig: Rig) -> None:
    rig.fetch(lambda *_: None)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and len(rig.source.ranges) == 1
    assert rig.sources.forgotten == 1


RUN = range(2, 8)


def _written_until(count: int, then: Take) -> Take:
    """The first so many frames come as they should."""
    left = [count]

    def take(data: memoryview, file: int, place: int) -> Taken | None:
        left[0] -= 1
        return _written(data, file, place) if left[0] >= 0 else then(data, file, place)

    return take


def test_a_run_comes_frame_by_frame(rig: Rig) -> None:
    there = list[int]()

    def take(data: memoryview, file: int, place: int) -> Taken:
        there.append(sum(rig.file.ready[frame] for frame in RUN))
        return _written(data, file, place)

    rig.fetch(take, RUN)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and not rig.source.ranges
    assert there == list(range(6))  # none waited for the next
    table = rig.file.table
    assert rig.counters.get("fetches") == 1 and rig.counters.get("frames_demanded") == 6
    assert rig.counters.get("fetched_bytes") == sum(table[frame].encoded_size for frame in RUN)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_run_that_becomes_slow_goes_on(rig: Rig, count: int) -> None:
    """Behind the frames that were taken, with one answer."""
    rig.sources.resumed = 1 << 30
    rig.fetch(_written_until(count, lambda *_: None), RUN)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and not rig.source.ranges
    assert rig.counters.get("fetches") == 1 and not rig.counters.get("fetch_retries")


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_that_breaks_off_is_fetched_from_there(rig: Rig, count: int) -> None:
    table = rig.file.table
    rig.sources.resumed = table[RUN[count]].encoded_size + 10  # one frame more, and a bit of the next
    frames = iter(RUN)

    def take(data: memoryview, file: int, place: int) -> Taken | None:
        if next(frames) < RUN[count]:
            return _written(data, file, place)
        rig.sources.take = _written
        return None

    rig.fetch(take, RUN)
    assert rig.answers == [0] and rig.is_right() and rig.counters.get("fetch_retries") == 1
    assert rig.counters.get("frames_demanded") == 6 and rig.counters.get("fetches") == 1


def test_an_answer_that_becomes_odd_leaves_the_others_to_the_ordinary_way(rig: Rig) -> None:
    rig.fetch(_written_until(2, lambda *_: None), RUN)
    assert rig.answers == [0] and rig.sent == 1 and rig.is_right() and rig.sources.forgotten == 1
    start = rig.file.table[RUN[2]].encoded_offset
    assert [offset for offset, _ in rig.source.ranges] == [start]


def test_a_wrong_frame_of_a_run_is_fetched_again_alone(rig: Rig) -> None:
    taken = list[int]()

    def take(data: memoryview, file: int, place: int) -> Taken | None:
        taken.append(place)
        if len(taken) == 3:
            return Taken(memoryview(bytes(len(data))), False, False, 0.0, 0.0)
        return _written(data, file, place)

    rig.fetch(take, RUN)
    assert rig.answers == [0] and rig.is_right() and rig.counters.get("corrupt_frames") == 1
    assert len(taken) == 7 and taken[6] == taken[2]


def test_a_full_disk_in_the_middle_of_a_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame is held, and written when there is room; the others do not wait for it."""
    full = [OSError(errno.ENOSPC, "full")]
    written, writer = list[int](), rig.file.writer
    assert writer is not None
    write = writer.write

    def on_full_disk(offset: int, data: bytes | memoryview) -> None:
        written.append(offset)
        if full:
            raise full.pop()
        write(offset, data)

    monkeypatch.setattr(writer, "write", on_full_disk)
    rig.fetch(_written_until(2, lambda data, file, place: Taken(data, True, False, 0.0, 0.0)), RUN)
    assert rig.answers == [0] and rig.is_right() and len(written) == 5 and written[0] == written[4]
    assert rig.counters.get("fetches") == 1


def test_the_sum_of_a_decoded_frame_is_kept_before_it_is_ready(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Form.DECODED)
    rig.file.sums = Sums(tmp_path, len(rig.file.table))
    rig.fetch(_written, RUN)
    for frame in RUN:
        offset, size = rig.file.place(rig.file.table[frame])
        assert rig.file.sums.fits(frame, rig.whole[offset : offset + size])
    rig.file.sums.close()
