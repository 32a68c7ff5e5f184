"""Frames of mounted images go under a quota, and no reader can tell: what may be being read is known, and stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form, device_tag
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.layout import Layout
from loader.cache.state import ImageRecord, State
from loader.cache.writer import BufferedWriter
from loader.keeper import readers
from loader.keeper.fdstore import FdStore
from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.readers import Readers
from loader.keeper.requests import Pending, RequestTable
from loader.keeper.state import State as KeeperState
from loader.worker.eviction import Culler
from loader.worker.link import CallError
from loader.worker.objects import object_name
from tests.support.cache_files import open_file, sample
from tests.support.daemon import Daemon, convert, drop_caches, make_files, read_all, result, start_reader
from tests.support.registry import docker_registry

FILES, SIZE = 24, 400_000
QUOTA = FILES * SIZE // 10


# Who reads


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_the_last_read_of_a_thread_counts_until_it_asks_again_or_ends(child: subprocess.Popen[bytes]) -> None:
    table = Readers.create()
    table.let_through(child.pid, 7, 0, 4096)
    table.let_through(os.getpid(), 7, 8192, 4096)
    assert sorted(table.reading(7)) == [(0, 4096), (8192, 12288)] and not table.reading(8)
    table.let_through(os.getpid(), 8, 0, 4096)
    assert table.reading(7) == [(0, 4096)] and table.reading(8) == [(0, 4096)]
    successor = Readers(os.dup(table.fd))
    assert successor.reading(7) == [(0, 4096)]
    child.kill()
    child.wait()
    assert successor.reading(7) == [] and successor.reading(8) == [(0, 4096)]


def test_threads_are_told_apart_from_their_process() -> None:
    table, leave, number = Readers.create(), threading.Event(), list[int]()

    def body() -> None:
        number.append(threading.get_native_id())
        leave.wait()

    thread = threading.Thread(target=body)
    thread.start()
    while not number:
        time.sleep(0.01)
    table.let_through(number[0], 1, 0, 4096)
    assert table.reading(1)
    leave.set()
    thread.join()
    until = time.monotonic() + 5
    while table.reading(1) and time.monotonic() < until:
        time.sleep(0.01)
    assert not table.reading(1)


def test_more_threads_than_can_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_lives", lambda thread: thread % 2)
    table = Readers.create()
    for thread in range(1, 3 * readers.CAPACITY // 2):
        table.let_through(thread, 1, 0, 4096)
    assert not table.lost  # those that ended made room
    for thread in range(1, 3 * readers.CAPACITY, 2):
        table.let_through(thread, 1, 0, 4096)
    assert table.lost and Readers(os.dup(table.fd)).lost


def test_a_thread_without_a_number_is_not_overlooked() -> None:
    table = Readers.create()
    table.let_through(0, 1, 0, 4096)
    assert table.lost


# What the keeper says

READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for line in sys.stdin:
    os.pread(fd, 4096, int(line))
"""


@pytest.mark.root
def test_what_may_be_read_is_not_idle(tmp_path: Path) -> None:
    """The reader is stopped between the kernel's question and its read, then again after it."""
    (tmp_path / "blobs").mkdir()
    path = tmp_path / "blobs" / "data"
    path.write_bytes(bytes(range(256)) * 256)
    plane = FanotifyPlane(FdStore(None), KeeperState.load(tmp_path), RequestTable(), {})
    item = plane.create("name", str(path), "encoded", 65536)
    ranges = [(0, 4096), (4096, 8192), (8192, 65536)]
    with subprocess.Popen([sys.executable, "-c", READ, str(path)], stdin=subprocess.PIPE, bufsize=0) as reader:
        assert reader.stdin is not None
        reader.stdin.write(b"4096\n")
        first = _next(plane)
        assert plane.idle(item.id, ranges) == [0, 2]  # it waits
        reader.send_signal(signal.SIGSTOP)
        plane._requests.take(first.id)
        plane.answer(first, 0)
        assert plane.idle(item.id, ranges) == [0, 2]  # it was let through
        reader.send_signal(signal.SIGCONT)
        reader.stdin.write(b"12288\n")
        second = _next(plane)
        assert plane.idle(item.id, ranges) == [0]
        plane._requests.take(second.id)
        plane.answer(second, 0)
        assert plane.idle(item.id, ranges) == [0, 1]  # it has asked again, so its first read has ended
        reader.stdin.close()
    assert plane.idle(item.id, ranges) == [0, 1, 2]
    plane.complete(item.id)
    assert plane.idle(item.id, ranges) == []  # without a mark nobody is seen
    plane.mark(item.id)
    assert plane.idle(item.id, ranges) == []  # nor is it known who began to read before it came back
    for fd in (plane.group, *plane.writers.values()):
        os.close(fd)


def _next(plane: FanotifyPlane) -> Pending:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for found in plane.read():
            assert isinstance(found, Pending)
            return found
        time.sleep(0.01)
    raise AssertionError("no event")


# What the worker does


def test_who_wants_a_reserved_frame_waits(tmp_path: Path) -> None:
    file = open_file(tmp_path, sample(4), Form.ENCODED)
    table = FlightTable(1, 1, (1 << 20,) * 3)
    file.ready.set(1)
    flights = table.reserve(file, [1, 2])
    assert [flight.frame for flight in flights] == [1, 2] and not table.reserve(file, [1])
    answers: list[int] = []

    def want(frame: int) -> int:
        waiter = Waiter(answers.append, time.monotonic() + 60)
        return table.want(file, [frame], Priority.DEMAND, waiter)

    assert want(1) == 0 and answers == [0]  # it is there still
    file.forget([1])
    assert want(1) == 1 and want(2) == 1 and answers == [0]
    file.restore([1])
    table.land(flights[0])
    assert answers == [0, 0]
    table.retry([flights[1]], 0.0)
    run = table.take()
    assert run is not None and [flight.frame for flight in run.flights] == [2]
    table.land(run.flights[0])
    table.finish(run)
    assert answers == [0, 0, 0] and len(table) == 0


def test_a_hole_gives_the_space_back(tmp_path: Path) -> None:
    file = open_file(tmp_path, sample(16), Form.DECODED)
    assert isinstance(file.writer, BufferedWriter)
    with file.writer.descriptor() as fd:
        for frame in file.table:
            file.write(frame, bytes((frame.number + 1,)) * frame.decoded_size)
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        offset, size = file.place(file.table[3])
        file.writer.punch(offset, size)
        assert os.pread(fd, size, offset) == bytes(size)
        assert os.lseek(fd, offset, os.SEEK_DATA) == offset + size
        assert before - os.fstat(fd).st_blocks == size // 512
        assert os.fstat(fd).st_size == file.size


class _Keeper:
    """Culls what is not busy."""

    def __init__(self, directory: Path, *busy: str) -> None:
        self.directory, self.busy = directory, busy
        self.culled: list[str] = []

    def call(self, call: str, timeout: float, /, **arguments: Any) -> None:
        assert call == "cull"
        if arguments["name"] in self.busy:
            raise CallError("in use", errno.EBUSY)
        (self.directory / arguments["directory"] / arguments["name"]).unlink()
        self.culled.append(arguments["name"])


def test_the_kernels_files_are_culled_by_age_but_what_is_pinned_or_in_use(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    state = State(layout.database)
    blobs = [Digest.of(bytes((number,))) for number in range(5)]
    image = ImageRecord(Digest.of(b"image"), "a", "a", 0, tuple((blob, 0) for blob in blobs[:4]))
    state.add_image(image, Form.ENCODED, Digest.of(b"payload"))
    for blob in (blobs[2], blobs[1], blobs[0], blobs[3]):
        state.touch_blobs([(blob, Form.ENCODED)])
        time.sleep(0.01)
    place = tmp_path / "cachefiles/cache/Ierofs,domain"
    for number, blob in enumerate(blobs):
        path = place / f"@{number:02x}" / f"D{device_tag(Form.ENCODED, blob)}"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(8192))
        layout.object(object_name("erofs,domain", path.name[1:])).mkdir()
    keeper = _Keeper(tmp_path / "cachefiles", f"D{blobs[2].hex}")
    culler = Culler(layout, state, keeper)  # type: ignore[arg-type]
    assert sum(file.allocated for file in culler.files()) == 5 * 8192
    assert culler.cull(3 * 8192, {blobs[0]}) == 3 * 8192
    assert keeper.culled == [f"D{blobs[number].hex}" for number in (4, 1, 3)]  # no image needs 4, 2 is in use
    assert {path.name for path in (tmp_path / "objects").iterdir()} == {
        object_name("erofs,domain", blobs[number].hex) for number in (0, 2)
    }
    state.close()


@pytest.mark.parametrize(
    ("directory", "name"), [("/etc", "a"), ("cache/../..", "a"), ("cache", "a/b"), ("cache", "..")]
)
def test_nothing_else_is_culled(directory: str, name: str) -> None:
    plane = CachefilesPlane.__new__(CachefilesPlane)
    plane.directory = Path("/nonexistent")
    with pytest.raises(PermissionError):
        plane.cull(directory, name)


# All of it


@pytest.mark.root
@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.value)
def test_readers_of_ten_times_the_quota_see_the_right_bytes(tmp_path: Path, form: Form) -> None:
    digests = make_files(tmp_path / "tree", FILES, SIZE)
    with docker_registry(tmp_path / "registry") as address:
        convert(tmp_path / "tree", f"docker://{address}/sample:1")
        with Daemon(tmp_path / "d", "--form", form.value, "--quota", str(QUOTA)) as daemon:
            target = daemon.mount(f"docker://{address}/sample:1")
            readers = [start_reader(target, seed) for seed in range(8)]
            assert all(result(reader) == digests for reader in readers)
            counters = daemon.counters()
            assert counters["requests_failed"] == counters["corrupt_frames"] == counters["damaged_frames"] == 0
            until = time.monotonic() + 20
            while (held := daemon.command("stats")["cache"]["allocated_bytes"]) > QUOTA and time.monotonic() < until:
                time.sleep(0.2)
            assert held <= QUOTA
            assert daemon.counters()["evicted_bytes"] > FILES * SIZE // 2
            assert daemon.command("scrub")["damaged"] == 0
            drop_caches()
            os.kill(daemon.worker(), signal.SIGKILL)  # what was evicted is not taken for ready by the next worker
            assert read_all(target) == digests
