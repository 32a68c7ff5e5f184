"""Frames in flight: who fetches which, who waits for it, and what is fetched first.

A frame that is wanted and not ready has one *flight*, however many readers want it. It waits in one of three queues,
is taken by a fetching thread together with its queued neighbours, and ends exactly once for everybody who waits:
landed (ready), failed (errno), or each waiter for itself at its deadline. A fetch that failed but may be repeated goes
back to its queue with a delay; its waiters stay, so no claim is ever left behind by a failed fetcher.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum, IntEnum
from typing import NamedTuple

from loader.cache.files import CacheFile

FLOWS = 10.0  # seconds since a frame landed in which what waits for its turn is just slow
LEAST_AHEAD = 128 << 10  # bytes that may be fetched ahead at once on any link


class Priority(IntEnum):
    """What goes first."""

    DEMAND = 0  # a reader stands and waits
    AHEAD = 1  # a reader will want it soon, most likely
    BACKGROUND = 2  # somebody asked for it to be fetched when there is nothing better to do


_PRIORITIES = tuple(Priority)  # going through the enumeration itself takes longer, with every READ


class Waiter:
    """Somebody who waits for frames: `done(errno)` is called once, no lock held, when all landed or one failed."""

    __slots__ = ("_done", "deadline", "firm", "remaining", "since")

    def __init__(self, done: Callable[[int], None], deadline: float, firm: bool = True) -> None:
        """The deadline of one that is not `firm` is for failures: while all goes well but slowly it waits on."""
        self._done: Callable[[int], None] | None = done
        self.deadline = deadline
        self.firm = firm
        self.remaining = 0
        self.since = time.monotonic()

    def take_done(self) -> Callable[[int], None] | None:
        """The callback, the first time only. Called under the table's lock."""
        done, self._done = self._done, None
        return done


class Flight:
    """One frame on its way."""

    __slots__ = (
        "attempts", "counted", "failed", "fetching", "file", "frame", "held", "priority", "refusals", "run", "waiters",
    )  # fmt: skip

    def __init__(self, file: CacheFile, frame: int, priority: Priority) -> None:
        self.file = file
        self.frame = frame
        self.priority = priority
        self.waiters: list[Waiter] = []
        self.fetching = False
        self.run: Run | None = None  # that took it, until it ends or is given back
        self.counted: Priority | None = None  # where its bytes count as being on their way
        self.attempts = 0
        self.failed = False  # an attempt has
        self.refusals = 0  # attempts whose bytes were wrong or not there
        self.held: bytes | None = None  # verified bytes that the disk has no room for

    @property
    def encoded_size(self) -> int:
        return self.file.table.frame_encoded_size(self.frame)


class Run(NamedTuple):
    """Adjacent frames of one file that one thread fetches as one range."""

    priority: Priority  # as it was taken; a reader may have joined since
    flights: list[Flight]


class Watch(Enum):
    """What a thread may be told to do instead of fetching."""

    WATCH = 1


WATCH = Watch.WATCH
Key = tuple[CacheFile, int]


class FlightTable:
    """All flights of a worker. Thread-safe."""

    def __init__(
        self,
        connections: int,
        prefetch_connections: int,
        range_limits: tuple[int, ...],
        window: Callable[[], int] | None = None,
    ) -> None:
        """`window`: bytes that keep the link busy; beyond them nothing more is fetched ahead, or readers would wait."""
        self._condition = threading.Condition()
        self._flights: dict[Key, Flight] = {}
        self._queues: tuple[OrderedDict[Key, Flight], ...] = tuple(OrderedDict() for _ in Priority)
        self._delayed: list[tuple[float, int, Flight]] = []
        self._order = itertools.count()
        self._fetching = [0 for _ in Priority]  # ranges in flight, by priority
        self._limits = (connections, prefetch_connections, prefetch_connections)
        self._range_limits = range_limits
        self._window = window
        self._flying = [0 for _ in Priority]  # bytes of these ranges
        self._idle = 0  # threads that wait in `take`
        self._called = False  # one of them was woken, and is on its way
        self._unwatched = False
        self._promised = False  # who watched fetches, and leaves the watch to one that waits, in a moment
        self._stopped = False
        self._landed = float("-inf")  # when a frame landed last, time.monotonic()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def idle(self) -> bool:
        """Whether no reader waits."""
        return not self._queues[Priority.DEMAND] and not self._fetching[Priority.DEMAND]

    def want(
        self,
        file: CacheFile,
        frames: Iterable[int],
        priority: Priority,
        waiter: Waiter | None = None,
        *,
        quiet: bool = False,
    ) -> int:
        """Have frames fetched that are not there; how many were not. With nothing missing, `waiter` is done at once.

        `quiet` wakes no thread: the caller will `take_now`.
        """
        missing = 0
        with self._condition:
            for frame in frames:
                if file.has(frame) if priority is Priority.DEMAND else file.ready[frame]:
                    continue
                missing += 1
                flight = self._flights.get((file, frame))
                if flight is None:
                    flight = self._flights[file, frame] = Flight(file, frame, priority)
                    self._queues[priority][file, frame] = flight
                elif priority < flight.priority:
                    self._promote(flight, priority)
                if waiter:
                    flight.waiters.append(waiter)
                    waiter.remaining += 1
            if missing and not quiet:
                self._wake()
            done = waiter.take_done() if waiter and not missing else None
        if done:
            done(0)
        return missing

    def _promote(self, flight: Flight, priority: Priority) -> None:
        key = (flight.file, flight.frame)
        if self._queues[flight.priority].pop(key, None):
            self._queues[priority][key] = flight
        flight.priority = priority

    def reserve(self, file: CacheFile, frames: Iterable[int]) -> list[Flight]:
        """Flights of those frames that have none: nobody fetches them, and who wants one that is not ready waits, until
        they are ended by `land` (it is ready) or `retry`."""
        reserved = []
        with self._condition:
            for frame in frames:
                if (file, frame) not in self._flights:
                    flight = self._flights[file, frame] = Flight(file, frame, Priority.BACKGROUND)
                    flight.fetching = True
                    reserved.append(flight)
        return reserved

    def take(self) -> Run | None:
        """The next run of adjacent frames to fetch, blocking; None when the table was stopped."""
        task = self.take_or_watch(may_watch=False)
        return task if isinstance(task, Run) else None

    def take_or_watch(self, may_watch: bool = True) -> Run | Watch | None:
        """The same, or WATCH if nobody watches for requests: the caller is the one who does now."""
        with self._condition:
            while not self._stopped:
                if self._unwatched and may_watch:
                    self._unwatched = self._promised = False
                    return WATCH
                self._release_delayed()
                priority = self._next()
                last = self._promised and may_watch and not self._idle  # who is to watch
                if priority is not None and not last:
                    return self._take_run(priority)
                self._idle += 1
                self._condition.wait(self._delayed[0][0] - time.monotonic() if self._delayed else None)
                self._idle -= 1
                self._called = False
        return None

    def take_now(self, least_idle: int = 0) -> Run | None:
        """The next run if there is one, and if at least so many threads are left that wait in `take`; else None.

        What is left is for those threads: one is woken if there is something for it. With `least_idle` it is who
        watches that asks, and will `unwatch`: the last thread that waits is kept for that.
        """
        with self._condition:
            priority = None if self._stopped else self._next()
            if priority is None:
                return None
            if self._idle < least_idle:
                self._condition.notify()
                return None
            self._promised |= least_idle > 0
            return self._take_run(priority)

    def unwatch(self) -> None:
        """Nobody watches for requests any more: one of those who wait shall."""
        with self._condition:
            self._unwatched = True
            self._condition.notify()

    def _next(self) -> Priority | None:
        """What is to be fetched next, if it may be fetched now."""
        return next((priority for priority in _PRIORITIES if self._queues[priority] and self._allowed(priority)), None)

    def _wake(self) -> None:
        """Wake one thread if there is something to fetch, unless one comes already; it wakes the next."""
        if not self._called and self._idle > self._promised and self._next() is not None:
            self._called = True
            self._condition.notify()

    def _allowed(self, priority: Priority) -> bool:
        if self._fetching[priority] >= self._limits[priority]:
            return False
        if priority is Priority.AHEAD and self._window is not None and self._flying[priority] > LEAST_AHEAD:
            return self._flying[priority] <= self._window()
        if priority is Priority.BACKGROUND:
            if not self.idle or self._fetching[Priority.AHEAD]:
                return False
            if self._window is not None and self._flying[priority]:
                following = next(iter(self._queues[priority].values()))
                return self._flying[priority] + following.encoded_size <= self._window()
        return True

    def _range_limit(self, priority: Priority) -> int:
        """Bytes of one range: on a slow link a large one is in the way of those that readers wait for."""
        limit = self._range_limits[priority]
        if self._window is None or priority is Priority.DEMAND:
            return limit
        return min(limit, max(self._window(), 2 * LEAST_AHEAD if priority is Priority.AHEAD else 0))

    def _take_run(self, priority: Priority) -> Run:
        queue = self._queues[priority]
        (file, frame), first = queue.popitem(last=False)
        flights, size = [first], first.encoded_size
        limit = self._range_limit(priority)
        while (following := queue.get((file, frame + 1))) and size + following.encoded_size <= limit:
            frame += 1
            del queue[file, frame]
            flights.append(following)
            size += following.encoded_size
        run = Run(priority, flights)
        for flight in flights:
            flight.run = run
            flight.fetching = True
            flight.counted = priority
            flight.attempts += 1
        self._fetching[priority] += 1
        self._flying[priority] += size
        self._wake()  # there may be room for one more
        return run

    def finish(self, run: Run) -> None:
        """The range of a taken run is over, whatever became of it. Flights that neither landed nor failed fly again.

        Those that were given back (`retry`) may fly already, with another run.
        """
        with self._condition:
            self._fetching[run.priority] -= 1
            for flight in [flight for flight in run.flights if flight.run is run]:
                self._arrived(flight)
                if flight.fetching and self._flights.get((flight.file, flight.frame)) is flight:
                    self._again(flight, 0.0)
            if self._delayed or self._queues[Priority.BACKGROUND]:
                self._condition.notify_all()  # else our own thread is enough to take what is next

    def retry(self, flights: Iterable[Flight], delay: float) -> None:
        """Fetch again after a delay (seconds); nobody is told. Without a waiter left, the flight ends."""
        with self._condition:
            for flight in flights:
                flight.failed = True
                self._again(flight, delay)
            self._condition.notify_all()

    def _again(self, flight: Flight, delay: float) -> None:
        self._arrived(flight)
        flight.run = None
        if self._flights.get((flight.file, flight.frame)) is not flight:
            return  # its file was closed meanwhile
        flight.fetching = False
        flight.waiters = [waiter for waiter in flight.waiters if waiter.remaining > 0]
        if not flight.waiters:
            self._flights.pop((flight.file, flight.frame), None)
        else:
            heapq.heappush(self._delayed, (time.monotonic() + delay, next(self._order), flight))

    def _release_delayed(self) -> None:
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, flight = heapq.heappop(self._delayed)
            key = (flight.file, flight.frame)
            if self._flights.get(key) is not flight or flight.fetching:
                continue
            if flight.waiters:
                self._queues[flight.priority][key] = flight
            else:
                del self._flights[key]

    def land(self, flight: Flight) -> None:
        """The frame is ready."""
        self._landed = time.monotonic()
        self._end([flight], 0)

    def fail(self, flights: Iterable[Flight], error: int) -> None:
        """The frames cannot be had; everybody who waits gets this errno."""
        self._end(flights, error)

    def _end(self, flights: Iterable[Flight], error: int) -> None:
        called: list[Callable[[int], None]] = []
        with self._condition:
            for flight in flights:
                key = (flight.file, flight.frame)
                if self._flights.get(key) is flight:
                    del self._flights[key]
                for queue in self._queues:
                    if queue.get(key) is flight:
                        del queue[key]
                flight.fetching, flight.run = False, None
                self._arrived(flight)
                for waiter in flight.waiters:
                    waiter.remaining -= 1
                    if (error or not waiter.remaining) and (done := waiter.take_done()):
                        waiter.remaining = 0 if error else waiter.remaining
                        called.append(done)
                flight.waiters = []
        for done in called:
            done(error)

    def arrives(self, flight: Flight) -> None:
        """Its bytes begin to come: the next range ahead is asked for meanwhile, or the link would idle for a round
        trip. (A prefetch rather lets it idle than be in a reader's way.)"""
        if flight.counted is Priority.AHEAD:
            with self._condition:
                self._arrived(flight)
                if self._queues[Priority.AHEAD]:
                    self._wake()

    def _arrived(self, flight: Flight) -> None:
        """Its bytes are on their way no more."""
        if flight.counted is not None:
            self._flying[flight.counted] -= flight.encoded_size
            flight.counted = None

    def expire(self) -> int:
        """End the waiting of everybody whose deadline has passed, with EIO; how many there were.

        On a slow link many may wait for their turn for long: that is no failure.
        """
        now = time.monotonic()
        called = []
        with self._condition:
            flows = now - self._landed < FLOWS
            late = dict[Waiter, bool]()  # and whether a fetch of what he waits for has failed
            for flight in self._flights.values():
                for waiter in flight.waiters:
                    if waiter.deadline <= now:
                        late[waiter] = late.get(waiter, False) or flight.failed
            ended = {waiter for waiter, failed in late.items() if failed or waiter.firm or not flows}
            for waiter in ended:
                waiter.remaining = 0
                if done := waiter.take_done():
                    called.append(done)
            for flight in self._flights.values() if ended else ():
                flight.waiters = [waiter for waiter in flight.waiters if waiter not in ended]
        for done in called:
            done(errno.EIO)
        return len(called)

    def forget(self, file: CacheFile) -> None:
        """The file is closed: drop what nobody takes any more and fail who waits."""
        with self._condition:
            flights = [flight for flight in self._flights.values() if flight.file is file]
        self.fail(flights, errno.EIO)

    def waiting(self) -> list[tuple[str, int, float]]:
        """Who waits: file, frame and age in seconds of the oldest waiter of each flight."""
        now = time.monotonic()
        with self._condition:
            return [
                (str(flight.file), flight.frame, now - min(waiter.since for waiter in flight.waiters))
                for flight in self._flights.values()
                if flight.waiters
            ]

    def stop(self) -> None:
        """Let every `take` return; flights stay with their waiters (the next worker gets the requests again)."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
