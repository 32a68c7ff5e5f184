"""READ to answer, against a source in memory and a file on disk: what is written, what is answered, what is fetched."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.claims import FlightTable
from loader.cache.files import CacheFile
from loader.cache.layout import Layout
from loader.cache.writer import Writer
from loader.errors import NotFoundError, RegistryError, TransientRegistryError
from loader.keeper.protocol import Request
from loader.worker.counters import Counters
from loader.worker.fetcher import Fetcher
from loader.worker.link_estimate import LinkEstimate
from loader.worker.objects import Object, Objects
from loader.worker.outages import TRY_AGAIN, Outages
from loader.worker.readahead import ReadAhead
from loader.worker.readpath import ReadPath
from loader.worker.sources import Sources
from tests.support.cache_files import MemorySource, open_file, sample, table_of
from tests.support.sample_blobs import SampleBlob


class Rig:
    """A read path with everything but the kernel."""

    def __init__(self, root: Path, form: Form, sources: int = 1, deadline: float = 20.0, room: int = 0) -> None:
        self.blob: SampleBlob = sample()
        self.file: CacheFile = open_file(root, self.blob, form)
        self.layout = Layout(root)
        self.form = form
        self.sources = [MemorySource({self.file.blob: bytes(self.blob.encoded)}) for _ in range(sources)]
        named = {f"source{number}": source for number, source in enumerate(self.sources)}
        opened = Sources(named.__getitem__)
        for name in named:
            opened.add(name, [self.file.blob])
        self.counters = Counters()
        self.flights = FlightTable(8, 2, (1 << 20, 1 << 20, 1 << 20))
        self.asked_for_room: list[int] = []
        outages = Outages(deadline)
        self.said_whole = threading.Event()
        self.fetcher = Fetcher(
            self.flights, opened, self.counters, LinkEstimate(), lambda size: self._room(size, room), outages,
            self.said_whole.set,
        )  # fmt: skip
        self.fetcher.start(8)
        self.evicted: Callable[[], None] = lambda: None
        self.answers: dict[int, list[int]] = {}
        self._answered = threading.Condition()
        self.executor = ThreadPoolExecutor(2)
        objects = Objects(self.layout, lambda fsid: None, lambda tag: None)
        objects._objects[1] = Object(1, "fanotify", self.file)
        self.path = ReadPath(
            objects, self.flights, ReadAhead(LinkEstimate(), 0), self.counters, self._answer, self.executor, outages
        )
        self.whole = bytes(self.blob.decoded if form is Form.DECODED else self.blob.encoded)

    def _room(self, size: int, room: int) -> int:
        self.asked_for_room.append(size)
        if room:
            self.evicted()
        return room

    def _answer(self, number: int, error: int) -> None:
        with self._answered:
            self.answers.setdefault(number, []).append(error)
            self._answered.notify_all()

    def read(self, number: int, offset: int, length: int) -> None:
        self.path.request(Request(number, 1, offset, length))

    def wait(self, *numbers: int) -> list[int]:
        """Each answer, of which there is exactly one."""
        with self._answered:
            assert self._answered.wait_for(lambda: all(number in self.answers for number in numbers), 20)
        assert all(len(self.answers[number]) == 1 for number in numbers)
        return [self.answers[number][0] for number in numbers]

    def on_disk(self) -> bytes:
        return self.layout.data(self.file.blob, self.form).read_bytes()

    def close(self) -> None:
        self.flights.stop()
        self.executor.shutdown()


class FullWriter:
    """A writer that fails until it has `room`."""

    def __init__(self, writer: Writer | None, error: int) -> None:
        self._writer, self._error, self.room = writer, error, False

    def write(self, offset: int, data: bytes | memoryview) -> None:
        if not self.room:
            raise OSError(self._error, os.strerror(self._error))
        assert self._writer is not None
        self._writer.write(offset, data)


@pytest.fixture(params=list(Form))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, request.param)
    yield made
    made.close()


def test_a_read_is_filled_from_one_range(rig: Rig) -> None:
    rig.read(1, 0, len(rig.whole))
    assert rig.wait(1) == [0]
    assert rig.on_disk() == rig.whole
    assert rig.said_whole.wait(20)
    assert rig.sources[0].ranges == [(0, len(rig.blob.encoded))]
    rig.read(2, 4096, 4096)
    assert rig.wait(2) == [0]
    assert len(rig.sources[0].ranges) == 1
    assert rig.counters.snapshot()["requests_ready"] == 1


def test_only_the_frames_under_a_read_are_fetched(rig: Rig) -> None:
    frame = rig.file.table[5]
    offset, size = rig.file.place(frame)
    rig.read(1, offset + size - 1, 1)
    assert rig.wait(1) == [0]
    assert rig.sources[0].ranges == [(frame.encoded_offset, frame.encoded_size)]
    expected = bytes(offset) + rig.whole[offset : offset + size] + bytes(len(rig.whole) - offset - size)
    assert rig.on_disk() == expected
    rig.close()
    assert not rig.said_whole.is_set()


def test_eight_readers_make_one_fetch(rig: Rig) -> None:
    rig.sources[0].delay = 0.05
    threads = [threading.Thread(target=rig.read, args=(number, 0, len(rig.whole))) for number in range(8)]
    for thread in threads:
        thread.start()
    assert rig.wait(*range(8)) == [0] * 8
    assert sum(length for _, length in rig.sources[0].ranges) == len(rig.blob.encoded)


def test_misses_of_several_readers_are_fetched_in_parallel(rig: Rig) -> None:
    rig.sources[0].delay = 0.1
    for number in range(0, 12, 2):
        offset, size = rig.file.place(rig.file.table[number])
        rig.read(number, offset, size)
    assert rig.wait(*range(0, 12, 2)) == [0] * 6
    assert rig.sources[0].most_at_once >= 4


def test_corrupt_bytes_are_never_written(rig: Rig) -> None:
    rig.sources[0].spoil = lambda data: data[:-1] + bytes((data[-1] ^ 1,))
    rig.read(1, 0, 1)
    assert rig.wait(1) == [errno.EIO]
    assert rig.on_disk() == bytes(len(rig.whole))
    assert rig.file.ready.count == 0
    assert rig.counters.snapshot()["corrupt_frames"] == 2
    rig.sources[0].spoil = lambda data: data
    rig.read(2, 0, 1)
    assert rig.wait(2) == [errno.EIO]  # not asked again for a moment
    time.sleep(TRY_AGAIN)
    rig.read(3, 0, 1)
    assert rig.wait(3) == [0]


def test_one_bad_frame_does_not_spoil_its_neighbours(rig: Rig) -> None:
    good = bytes(rig.blob.encoded)
    bad = bytearray(good)
    bad[rig.file.table[4].encoded_offset] ^= 1
    rig.sources[0].blobs = {rig.file.blob: bytes(bad)}
    rig.read(1, 0, len(rig.whole))
    assert rig.wait(1) == [errno.EIO]
    until = time.monotonic() + 10
    while len(rig.flights) and time.monotonic() < until:
        time.sleep(0.01)
    assert [frame for frame in range(len(rig.file.table)) if not rig.file.ready[frame]] == [4]


def test_transient_errors_only_delay(rig: Rig) -> None:
    failures = [TransientRegistryError("busy"), RegistryError("login expired"), OSError(errno.ECONNRESET, "reset")]

    def before(digest: Digest, offset: int, length: int) -> None:
        if failures:
            raise failures.pop()

    rig.sources[0].before = before
    rig.read(1, 0, 1)
    assert rig.wait(1) == [0]
    assert rig.counters.snapshot()["fetch_retries"] == 3
    assert rig.fetcher.last_errors["source0"] == "busy"


def test_the_deadline_ends_a_wait(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Form.ENCODED, deadline=0.05)

    def before(digest: Digest, offset: int, length: int) -> None:
        raise TransientRegistryError("busy", retry_after=5)

    rig.sources[0].before = before
    rig.read(1, 0, 1)
    time.sleep(0.1)
    assert rig.flights.expire() == 1
    assert rig.wait(1) == [errno.EIO]
    rig.close()


@pytest.mark.parametrize("fault", ["corrupt", "missing", "down", "short"])
def test_the_next_source_is_asked(tmp_path: Path, fault: str) -> None:
    rig = Rig(tmp_path, Form.ENCODED, sources=2)
    first = rig.sources[0]

    def before(digest: Digest, offset: int, length: int) -> None:
        if fault == "missing":
            raise NotFoundError("no such blob")
        if fault == "down":
            raise TransientRegistryError("down")

    first.before = before
    if fault == "corrupt":
        first.spoil = lambda data: bytes(len(data))
    if fault == "short":
        first.spoil = lambda data: data[:-1]
    rig.read(1, 0, 1)
    assert rig.wait(1) == [0]
    assert len(first.ranges) == len(rig.sources[1].ranges) == 1
    rig.close()


def test_a_blob_that_is_nowhere_is_an_error(rig: Rig) -> None:
    def before(digest: Digest, offset: int, length: int) -> None:
        raise NotFoundError("no such blob")

    rig.sources[0].before = before
    rig.read(1, 0, 1)
    assert rig.wait(1) == [errno.EIO]
    assert len(rig.flights) == 0


def test_a_bug_in_a_source_still_answers(rig: Rig) -> None:
    def before(digest: Digest, offset: int, length: int) -> None:
        raise ZeroDivisionError

    rig.sources[0].before = before
    rig.read(1, 0, 1)
    assert rig.wait(1) == [errno.EIO]


def test_an_unknown_object_is_an_error(rig: Rig) -> None:
    rig.path.request(Request(9, 77, 0, 4096))
    assert rig.wait(9) == [errno.EIO]


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS])
def test_a_full_disk_is_evicted_from_then_waited_for(tmp_path: Path, room: int, error: int) -> None:
    """Without a second fetch: what was verified is kept meanwhile."""
    rig = Rig(tmp_path, Form.ENCODED, room=room)
    full = FullWriter(rig.file.writer, error)
    rig.file.writer = full  # type: ignore[assignment]
    rig.evicted = lambda: setattr(full, "room", True)
    rig.read(1, 0, 1)
    if not room:
        time.sleep(0.5)
        assert not rig.answers
        assert len(rig.asked_for_room) > 1
        assert os.strerror(error) in rig.fetcher.why(rig.file)
    full.room = True
    assert rig.wait(1) == [0]
    assert len(rig.sources[0].ranges) == 1
    rig.close()


def test_a_disk_that_stays_full_is_an_error_at_the_deadline(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Form.ENCODED, deadline=0.3)
    rig.file.writer = FullWriter(rig.file.writer, errno.ENOSPC)  # type: ignore[assignment]
    rig.read(1, 0, 1)
    time.sleep(0.4)
    assert rig.flights.expire() == 1
    assert rig.wait(1) == [errno.EIO]
    rig.close()


def test_a_disk_that_fails_is_an_error_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Form.ENCODED)
    rig.file.writer = FullWriter(rig.file.writer, errno.EROFS)  # type: ignore[assignment]
    rig.read(1, 0, 1)
    assert rig.wait(1) == [errno.EIO]
    assert "Read-only" in rig.fetcher.why(rig.file)
    rig.close()


def test_an_outage_has_one_deadline_for_all_reads(tmp_path: Path) -> None:
    """The kernel asks again for every page of a range that was denied, one after the other."""
    rig = Rig(tmp_path, Form.ENCODED, deadline=0.5)

    def before(digest: Digest, offset: int, length: int) -> None:
        raise TransientRegistryError("busy")

    rig.sources[0].before = before
    started = time.monotonic()
    for number in range(100):
        offset, size = rig.file.place(rig.file.table[number % 12])
        rig.read(number, offset, size)
        while number not in rig.answers:
            time.sleep(0.01)
            rig.flights.expire()
    assert rig.wait(*range(100)) == [errno.EIO] * 100
    assert time.monotonic() - started < 5
    assert rig.counters.snapshot()["requests_denied"] > 90
    rig.sources[0].before = lambda digest, offset, length: None
    time.sleep(TRY_AGAIN)
    rig.read(1000, 0, 1)
    assert rig.wait(1000) == [0]
    rig.close()


def test_a_frame_that_decodes_to_more_than_its_table_says_is_refused(tmp_path: Path) -> None:
    """The digest is right, the size is not: decoding must stay bounded."""
    import zstandard

    from erofs_builder.frames import FrameTable

    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    bomb += b"\x50\x2a\x4d\x18" + (4096 - len(bomb) % 4096 - 8).to_bytes(4, "little")
    bomb += bytes(-len(bomb) % 4096)
    table = FrameTable(Digest.of(bomb), [len(bomb) // 4096], [1], Digest.of(bomb).raw)
    rig = Rig(tmp_path, Form.DECODED)
    rig.sources[0].blobs[rig.file.blob] = bomb
    rig.file.table = table
    rig.read(1, 0, 1)
    opened = rig.wait(1)
    assert opened == [errno.EIO]
    assert table_of(rig.blob).blob_digest != table.blob_digest
    rig.close()
