"""The keeper's way of an event in C, beside the Python that does the same: whatever comes, the same becomes of it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fanotify
from fanotify.wire import INFO_RANGE, METADATA, RESPONSE, Event, parse_events
from loader.keeper import journal, presence, readers
from loader.keeper._events import lib
from loader.keeper.events import Events, Seen
from loader.keeper.fdstore import FdStore
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.presence import BLOCK, Presence
from loader.keeper.protocol import Kind, Request, pack_request, unpack
from loader.keeper.requests import Pending, Present, Repeats, RequestTable
from loader.keeper.state import State

SIZE = 64 * BLOCK - 100  # what frames cover of a file; it is a block longer
NAMES = ("one", "two", "released", "stranger")  # files; the last one is no object
THREADS = (1, 77, 77 + 8192, 4194304)  # two of which share a place in the C's memory


class Twin(Events):
    """Sees to nothing: all is left to Python."""

    def take(self, worker: int, first: int, epoll: int = -1) -> Iterator[Seen | Event]:
        yield from parse_events(os.read(self.group, 1 << 16))

    def allow(self, fd: int, writer: int, thread: int, object_id: int, offset: int, length: int) -> int | None:
        return None

    def __init__(self, group: int, journal: Any, table: Any) -> None:
        super().__init__(group, journal, table)
        self.group = group


@dataclass(frozen=True)
class Asked:
    """An event as it is to come. `shape`: "range", "none" (without a range), "odd" (an info record more)."""

    name: str
    offset: int
    length: int
    thread: int
    shape: str = "range"
    mask: int = fanotify.group.PRE_ACCESS

    def encode(self, fd: int) -> bytes:
        info = b"" if self.shape == "none" else INFO_RANGE.pack(6, 0, INFO_RANGE.size, 0, self.offset, self.length)
        info = struct.pack("=BBHI", 99, 0, 8, 0) + info if self.shape == "odd" else info
        return METADATA.pack(METADATA.size + len(info), 3, 0, METADATA.size, self.mask, fd, self.thread) + info


class Side:
    """A plane with two files and their bitmaps, a group that is a socket, and a worker's."""

    def __init__(self, root: Path, events: type[Events]) -> None:
        self.files = {name: root / "blobs" / name for name in NAMES}
        (root / "blobs").mkdir(parents=True)
        for file in self.files.values():
            file.touch()
            os.truncate(file, SIZE + 100 + BLOCK)
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.worker, keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, ours, self.worker):
            end.setblocking(False)
        self._ends = ours, keepers
        self.to_worker = keepers.fileno()
        with (
            mock.patch("fanotify.init", ours.fileno),
            mock.patch("fanotify.mark_fd"),
            mock.patch("loader.keeper.plane_fanotify.Events", events),
        ):
            self.plane = FanotifyPlane(FdStore(None), State.load(root), RequestTable(), {})
            self.items = {name: self.plane.create(name, str(self.files[name]), "encoded", SIZE) for name in NAMES[:-1]}
        self.bitmaps = {}
        for name, item in self.items.items():
            fd = self.plane.lend(item.id)
            assert fd is not None
            self.bitmaps[name] = Presence(fd, writable=True)
            os.close(fd)
        self.items["released"].released = True
        self.plane._show(self.items["released"])
        self.numbers = dict[int, int]()  # of an event's descriptor: which event it is
        self._answers: list[tuple[int, int]] = []
        self._count = itertools.count()

    def fill(self, name: str, block: int, count: int, *, said: bool) -> None:
        with open(self.files[name], "r+b") as file:
            os.pwrite(file.fileno(), b"x" * BLOCK * count, block * BLOCK)
        if said and name in self.bitmaps and block * BLOCK < SIZE:
            self.bitmaps[name].set(block * BLOCK, min(count * BLOCK, SIZE - block * BLOCK))

    def know(self, name: str, block: int, count: int) -> None:
        """The worker knows that to be read."""
        if name in self.bitmaps and block * BLOCK < SIZE:
            self.bitmaps[name].know(block * BLOCK, min(count * BLOCK, SIZE - block * BLOCK))

    def read(self, events: Sequence[Asked]) -> list[Pending | Present | Repeats]:
        """What the plane makes of events that come at once."""
        self.send(events)
        return list(self.plane.read(self.to_worker))

    def send(self, events: Sequence[Asked]) -> None:
        data = b""
        for event in events:
            fd = os.open(self.files[event.name], os.O_RDONLY)
            self.numbers[fd] = next(self._count)
            data += event.encode(fd)
        self.kernel.send(data)

    def come(self, events: Sequence[Asked]) -> list[tuple[Any, ...]]:
        """The same in numbers that both sides share, once everybody has got what was for him: in the order of the
        events what the worker hears of, at once or by Python, and then what is only counted."""
        found = self.read(events)
        self._collect()
        repeats = [each for each in found if isinstance(each, Repeats)]
        counted = ("repeats", sum(each.number for each in repeats), sum(each.length for each in repeats))
        left = [each for each in found if not isinstance(each, Repeats)]
        sent = [each for each in left if isinstance(each, Pending) and each.sent]
        assert left[: len(sent)] == sent
        heard = [self._heard(packet, sent) for packet in self._packets()]
        assert sum(each[0] != "present" for each in heard) == len(sent)
        return [*heard, *map(self._plain, left[len(sent) :]), *([counted] if repeats else [])]

    def _packets(self) -> list[bytes]:
        got = []
        with contextlib.suppress(BlockingIOError):
            while True:
                got.append(self.worker.recv(256))
        return got

    def _heard(self, packet: bytes, sent: Sequence[Pending]) -> tuple[Any, ...]:
        """What the worker was told or asked by C."""
        kind, body = unpack(packet)
        assert isinstance(body, Request)
        if kind is Kind.PRESENT:
            assert body.id == 1
            return ("present", body.object, body.offset, body.length)
        (pending,) = [each for each in sent if each.id == body.id]
        assert packet == pack_request(Request(pending.id, pending.object, pending.offset, pending.length))
        return self._plain(pending)

    def _plain(self, each: Pending | Present) -> tuple[Any, ...]:
        if isinstance(each, Present):
            return ("present", *each)
        return each.id, each.object, each.offset, each.length, each.thread, self.numbers[each.token]

    def answer(self, which: int, error: int) -> None:
        waiting = list(self.plane._requests)
        if waiting:
            pending = self.plane._requests.take(waiting[which % len(waiting)].id)
            assert pending is not None
            self.plane.answer(pending, error)
            self._collect()

    def _collect(self) -> None:
        """The answers that the kernel got. Their descriptors were closed: at once, before others get their numbers."""
        with contextlib.suppress(BlockingIOError):
            while True:
                fd, response = RESPONSE.unpack(self.kernel.recv(64))
                with pytest.raises(OSError):
                    os.fstat(fd)
                self._answers.append((self.numbers.pop(fd), response))

    def state(self) -> tuple[Any, ...]:
        """All that anybody can see of what was done."""
        for fd in self.numbers:
            os.fstat(fd)
        entries = [(self.numbers[fd], *rest) for fd, *rest in self.plane._journal.entries()]
        table = readers.Readers(self.plane._readers.fd)
        reading = [sorted(self._reads(table, item.id)) for item in self.items.values()]
        waiting = [self._plain(pending) for pending in self.plane._requests]
        return self._answers, sorted(entries), reading, table.lost, waiting, self.plane.counters

    @staticmethod
    def _reads(table: readers.Readers, object_id: int) -> list[tuple[int, int]]:
        with mock.patch("loader.keeper.readers._lives", return_value=True):
            return table.reading(object_id)

    def close(self) -> None:
        own = (self.plane._journal.fd, self.plane._readers.fd, *self.plane.writers.values(), *self.numbers)
        for fd in own:
            os.close(fd)
        for end in (self.kernel, self.worker, *self._ends):
            end.close()


@pytest.fixture(autouse=True)
def _end() -> Iterator[None]:
    """Maps hold descriptors: they end here, not while another test counts those."""
    yield
    gc.collect()


@contextlib.contextmanager
def both() -> Iterator[tuple[Side, Side]]:
    with tempfile.TemporaryDirectory() as name:
        sides = Side(Path(name) / "c", Events), Side(Path(name) / "python", Twin)
        try:
            yield sides
        finally:
            for side in sides:
                side.close()


BLOCKS = st.integers(0, 66)
EVENTS = st.builds(
    Asked,
    st.sampled_from(NAMES),
    BLOCKS.map(lambda block: block * BLOCK) | st.sampled_from((5, SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1)),
    st.sampled_from((0, 1, 100, BLOCK, 4 * BLOCK, 1 << 20, (1 << 64) - 1)),
    st.sampled_from((*THREADS, *THREADS, 0)),
    st.sampled_from(("range",) * 8 + ("none", "odd")),
)
STEPS = st.one_of(
    st.lists(EVENTS, min_size=1, max_size=6),
    st.tuples(st.sampled_from(NAMES), BLOCKS, st.integers(1, 8), st.sampled_from(("filled", "said", "known"))),
    st.tuples(st.integers(0, 5), st.sampled_from((0, 0, 0, 5))),
)


@settings(deadline=None, max_examples=120)
@given(st.lists(STEPS, max_size=12))
def test_the_same_becomes_of_all_events(steps: list[Any]) -> None:
    with both() as (quick, plain):
        for step in steps:
            if isinstance(step, list):
                assert quick.come(step) == plain.come(step)
            elif len(step) == 4:
                name, block, count, what = step
                for side in (quick, plain):
                    if what == "known":
                        side.know(name, block, count)
                    else:
                        side.fill(name, block, count, said=what == "said")
            else:
                for side in (quick, plain):
                    side.answer(*step)
            assert quick.state() == plain.state()


def test_what_is_there_is_answered_and_what_is_not_is_sent() -> None:
    """The way of nearly all events, and that C goes it: what it sees to, it says of itself."""
    with both() as (side, _):
        side.fill("one", 0, 4, said=True)
        first = Asked("one", 0, 4 * BLOCK, 77)
        assert side.come([first]) == [("present", 1, 0, 4 * BLOCK)]  # a new thread: Python finds it a place
        missing = Asked("one", 8 * BLOCK, BLOCK, 77)
        with mock.patch.object(side.plane, "_record", side_effect=AssertionError):
            assert side.come([first]) == [("present", 1, 0, 4 * BLOCK)]
            assert [getattr(each, "sent", None) for each in side.read([missing, missing])] == [True, True]
            assert [getattr(each, "sent", None) for each in side.read([first, missing])] == [True]
            side._collect()
            assert [unpack(packet)[0] for packet in side._packets()][-2:] == [Kind.PRESENT, Kind.REQUEST]
            on = Asked("one", 4 * BLOCK, BLOCK, 77)
            side.fill("one", 4, 1, said=True)
            assert [type(each).__name__ for each in side.read([first, on, missing])] == ["Present", "Pending"]
        told_first = [pending.sent for pending in side.plane._requests]  # what came before the last one is, in Python
        assert told_first == [True, True, True, False]
        side.fill("one", 8, 1, said=False)
        with mock.patch.object(side.plane, "_hole_in", side_effect=AssertionError):
            side.answer(0, 0)
        assert side.plane.counters["allowed"] == 6


def test_what_is_known_to_be_read_is_only_counted() -> None:
    with both() as (side, _):
        side.fill("one", 0, 4, said=True)
        side.come([Asked("one", 0, 4 * BLOCK, 77)])
        side.know("one", 0, 4)
        side.know("one", 8, 1)
        again, missing = Asked("one", BLOCK, 2 * BLOCK, 77), Asked("one", 8 * BLOCK, BLOCK, 77)
        with mock.patch.object(side.plane, "_record", side_effect=AssertionError):
            assert side.come([again, again]) == [("repeats", 2, 4 * BLOCK)]
            asked, counted = side.come([again, missing])  # the worker was asked at once: nothing was to be told before
            assert counted == ("repeats", 1, 2 * BLOCK) and [pending.sent for pending in side.plane._requests] == [True]
        assert side.plane.counters["allowed"] == side.plane.counters["present"] == 4
        side.bitmaps["one"].forget_known()
        assert side.come([again]) == [("present", 1, BLOCK, 2 * BLOCK)]
        side.bitmaps["one"].clear(0, SIZE)
        side.know("one", 0, 4)
        assert side.come([again])[0][0] == 2  # it is to be fetched, whatever is known


def test_while_only_repeats_come_nobody_is_called() -> None:
    """Until something else waits, or nothing comes for a moment."""
    with both() as (side, _), select.epoll() as epoll:
        epoll.register(side.plane.group, select.EPOLLIN)
        again = _repeat(side)
        for _ in range(3):
            side.send([again])
        assert _numbers(side, epoll) == [3]
        side.send([again])
        side.send([again, Asked("one", 8 * BLOCK, BLOCK, 77)])
        side.send([again])
        assert _numbers(side, epoll) == ["Pending", 2]
        other, end = socket.socketpair()
        epoll.register(other, select.EPOLLIN)
        end.send(b"x")
        side.send([again])
        assert _numbers(side, epoll) == [1]  # one of the two that wait by then
        assert _numbers(side, epoll) == [1]
        assert _numbers(side, epoll) == []
        other.close()
        end.close()


def test_the_clock_is_looked_at_however_many_repeats_come() -> None:
    with both() as (side, _), select.epoll() as epoll:
        epoll.register(side.plane.group, select.EPOLLIN)
        again = _repeat(side)
        for _ in range(4):
            side.send([again])
        with mock.patch("loader.keeper.events.LONGEST", 0.0):
            assert _numbers(side, epoll) == [1]
        assert _numbers(side, epoll) == [3]


def test_what_is_no_plain_event_ends_it() -> None:
    with both() as (side, _), select.epoll() as epoll:
        epoll.register(side.plane.group, select.EPOLLIN)
        again = _repeat(side)
        side.send([again, Asked("one", 0, BLOCK, 77, "odd"), again])
        side.send([again])
        assert _numbers(side, epoll) == [1, 1, 1]  # Python's two, then C's; "present" is not said of what is known
        assert _numbers(side, epoll) == [1]


def _repeat(side: Side) -> Asked:
    """An event of what is there, by a thread that is known, and known to be read."""
    side.fill("one", 0, 4, said=True)
    side.come([Asked("one", 0, 4 * BLOCK, 77)])
    side.know("one", 0, 4)
    return Asked("one", BLOCK, 2 * BLOCK, 77)


def _numbers(side: Side, epoll: select.epoll) -> list[str | int]:
    found = list(side.plane.read(side.to_worker, epoll.fileno()))
    side._collect()
    return [each.number if isinstance(each, Repeats) else type(each).__name__ for each in found]


def test_a_hole_under_a_bit_is_asked_for() -> None:
    """A worker that says what is not true harms nobody: zeros are never let through."""
    with both() as (side, _):
        side.bitmaps["one"].set(0, SIZE)
        side.fill("one", 0, 2, said=True)
        side.come([Asked("one", 0, BLOCK, 77)])
        ((number, *_),) = side.come([Asked("one", BLOCK, 2 * BLOCK, 77)])
        assert number == 1
        side.answer(0, 0)
        assert side.plane.counters["holes"] == 1 and side.plane.counters["denied"] == 1


def test_a_worker_that_does_not_take_it_is_asked_later() -> None:
    with both() as (side, _):
        with contextlib.suppress(BlockingIOError):
            while True:
                side._ends[1].send(b"x" * 1000, socket.MSG_DONTWAIT)
        found = side.read([Asked("one", 0, BLOCK, 77)])
        assert [each.sent for each in found if isinstance(each, Pending)] == [False]


def test_c_and_python_agree_on_what_both_write_down() -> None:
    python = (presence.BLOCK, journal.CAPACITY, journal._START, readers.CAPACITY, Kind.REQUEST, Kind.PRESENT)
    assert python == (
        lib.EOD_BLOCK, lib.EOD_JOURNAL_CAPACITY, lib.EOD_JOURNAL_START, lib.EOD_READERS_CAPACITY, lib.EOD_REQUEST,
        lib.EOD_TELL,
    )  # fmt: skip


def test_many_objects_come_and_go() -> None:
    """The C's table of inodes against a dictionary."""
    with both() as (side, _):
        events = side.plane._events
        known = dict[tuple[int, int], int]()
        for number in range(3000):
            inode = (7, number * 7919 % 4096)
            if number % 3 == 2 and known:
                gone = list(known)[number % len(known)]
                events.drop(gone)
                del known[gone]
            else:
                events.put(inode, number, SIZE, 0, None)
                known[inode] = number
            events.drop((9, number))  # nobody has it
        for name, item in side.items.items():
            if name != "released":
                assert side.come([Asked(name, 0, BLOCK, 77)])[0][1] == item.id
        with mock.patch.object(side.plane, "_record", side_effect=AssertionError):
            side.read([Asked("two", 0, BLOCK, 77)])


def test_an_event_that_is_malformed_loses_none_before_it() -> None:
    """It ends this keeper; the next one finds what came before in the journal, and denies what came after."""
    with both() as (side, _):
        fd = os.open(side.files["one"], os.O_RDONLY)
        side.numbers[fd] = 0
        side.kernel.send(Asked("one", 0, BLOCK, 77).encode(fd) + bytes(24))
        with pytest.raises(ValueError, match="event version 0"):
            list(side.plane.read(side.to_worker))
        assert [entry.fd for entry in side.plane._journal.entries()] == [fd]


def test_who_is_let_through_is_known_before_and_the_number_taken_until_after() -> None:
    """The kernel's end takes nothing: the answer stands in its write(2), and one can look around."""
    with both() as (side, _):
        side.fill("one", 0, 16, said=True)
        side.come([Asked("one", 0, BLOCK, 77)])
        ((*_, event),) = side.come([Asked("two", 0, BLOCK, 77)])
        side.fill("two", 0, 1, said=False)
        for read, what in (
            (lambda: side.read([Asked("one", BLOCK, BLOCK, 77)]), (side.items["one"].id, BLOCK, BLOCK)),
            (lambda: side.plane.answer(side.plane._requests.take_all()[0], 0), (side.items["two"].id, 0, BLOCK)),
        ):
            thread = _into_full(side, read)
            assert side.plane._readers.last(77) == what
            waiting = {entry.fd for entry in side.plane._journal.entries()}
            assert waiting == {fd for fd, number in side.numbers.items() if number == event}
            while (answer := side.kernel.recv(8)) == bytes(8):
                pass
            thread.join(20)
            side.numbers.pop(RESPONSE.unpack(answer)[0])
            side.kernel.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while side.kernel.recv(8) == bytes(8):
                    pass
        assert not list(side.plane._journal.entries())


def _into_full(side: Side, call: Callable[[], object]) -> threading.Thread:
    """Begin a call that writes into the group, where there is no room: the thread that stands there."""
    group = side.plane.group
    os.set_blocking(group, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(group, bytes(8))
    os.set_blocking(group, True)
    side.kernel.settimeout(20)
    thread = threading.Thread(target=call)
    thread.start()
    _until_blocked(thread)
    return thread


def _until_blocked(thread: threading.Thread) -> None:
    """Wait until a thread sleeps in write(2)."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        time.sleep(0.01)
        if Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0] == "1":
            return
    raise AssertionError("it does not wait")


def test_a_file_of_which_nothing_is_known_lets_nobody_through() -> None:
    """Whatever the reason why the kernel does not tell its holes."""
    with both() as (side, _):
        side.fill("one", 0, 4, said=True)
        side.come([Asked("one", 0, BLOCK, 77)])
        side.come([Asked("one", 8 * BLOCK, BLOCK, 77)])
        ends = os.pipe()
        os.dup2(ends[0], side.plane.writers[side.items["one"].id])
        assert side.come([Asked("one", 0, BLOCK, 77)]) == []
        side.answer(0, 0)
        assert side.plane.counters["denied"] == 2
        for fd in ends:
            os.close(fd)


def test_an_object_that_is_gone_lets_nobody_through() -> None:
    """Its writer's number may be another file's by then."""
    with both() as (side, _):
        side.fill("one", 0, 16, said=True)
        side.come([Asked("one", 0, BLOCK, 77)])
        item = side.items["one"]
        writer = side.plane.writers[item.id]
        side.files["one"].unlink()
        side.files["one"].write_bytes(b"x" * SIZE)
        stays = os.open(side.files["two"], os.O_RDONLY)
        fd = os.open(f"/proc/self/fd/{writer}", os.O_RDONLY)  # the file that has no name any more
        with mock.patch("fanotify.unmark_fd"):
            side.plane.release(item.id)
        os.dup2(stays, writer)
        side.numbers[fd] = next(side._count)
        side.kernel.send(Asked("one", 0, BLOCK, 77).encode(fd))
        assert not list(side.plane.read(side.to_worker))
        side._collect()
        assert side.plane.counters["denied"] == 1
        for left in (stays, writer):
            os.close(left)


def test_an_object_that_is_released_but_guarded_lets_nobody_through() -> None:
    with both() as (side, _):
        side.fill("one", 0, 16, said=True)
        side.come([Asked("one", 0, BLOCK, 77)])
        item = side.items["one"]
        item.mounted, item.form = True, "decoded"
        side.plane.release(item.id)
        assert item.released and side.come([Asked("one", 0, BLOCK, 77)]) == []
        assert side.plane.counters["denied"] == 1


@pytest.mark.root
@pytest.mark.parametrize("events", [Events, Twin])
def test_what_was_answered_before_says_nothing_new(events: type[Events], tmp_path: Path) -> None:
    """A keeper that was killed between an answer and its note of it: the next one answers again, to no avail.

    The thread has gone on to another read since, and that is the one that must stay known.
    """
    side = Side(tmp_path, events)
    real = fanotify.init()
    try:
        side.fill("one", 0, 16, said=True)
        side.come([Asked("one", 4 * BLOCK, BLOCK, 77)])
        (pending,) = side.read([Asked("two", 0, BLOCK, 77)])
        side.fill("two", 0, 1, said=False)
        counters = dict(side.plane.counters)
        side.plane.group = real  # which knows of no event with this number
        with mock.patch.object(side.plane, "_events", events(real, side.plane._journal.memory, _table(side))):
            side.plane._events.know(77, side.plane._readers._slots[77])
            assert isinstance(pending, Pending) and side.plane._requests.take(pending.id) is pending
            side.plane.answer(pending, 0)
        assert side.plane._readers.last(77) == (side.items["one"].id, 4 * BLOCK, BLOCK)
        assert not list(side.plane._journal.entries()) and side.plane.counters == counters
        with pytest.raises(OSError):
            os.fstat(pending.token)
        side.numbers.pop(pending.token)
    finally:
        os.close(real)
        side.close()


def _table(side: Side) -> mmap.mmap:
    return side.plane._readers.memory
