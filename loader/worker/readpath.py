"""A READ of the kernel, from its arrival to its answer:

object → frames that cover it → all there: answer → just found not to be had (outages.py): EIO
       → else: their flights (fetcher.py) → the last one landed: answer
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

from erofs_builder.errors import FormatError, IntegrityError
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.files import CacheFile
from loader.errors import LoaderError
from loader.keeper.protocol import Request
from loader.worker.counters import Counters
from loader.worker.objects import MetadataObject, Objects
from loader.worker.outages import Outages
from loader.worker.readahead import ReadAhead

log = logging.getLogger(__name__)

KEPT_FAILURES = 20  # the last ones, for `status`


class Failure(NamedTuple):
    """A READ that was answered with an error; `at` in seconds since the epoch."""

    at: float
    file: str
    offset: int
    length: int
    reason: str


class ReadPath:
    """Turns requests into answers, each exactly one. `answer(id, errno)` tells the keeper."""

    def __init__(
        self,
        objects: Objects,
        flights: FlightTable,
        readahead: ReadAhead,
        counters: Counters,
        answer: Callable[[int, int], None],
        executor: Executor,
        outages: Outages,
        why: Callable[[CacheFile], str] = lambda file: "",
        quiet: bool = False,
    ) -> None:
        """`quiet`: who calls will `take_now` what there is to fetch, and `follow` when nobody waits for it."""
        self._objects = objects
        self._flights = flights
        self._readahead = readahead
        self._counters = counters
        self._answer = answer
        self._executor = executor
        self._outages = outages
        self._why = why
        self._quiet = quiet
        self._read = deque[tuple[CacheFile | None, range, Request, int]]()  # what was asked for, until `follow`
        self.failures = deque[Failure](maxlen=KEPT_FAILURES)

    def request(self, request: Request) -> None:
        """Serve a READ. Returns at once; the answer may come later, from another thread."""
        item = self._objects.get(request.object)
        if item is not None and (file := item.file) is not None:
            self._blob(request, file)
            return
        self._counters.add("requests")
        self._counters.add("request_bytes", request.length)
        if item is not None and item.metadata is not None:
            self._executor.submit(self._metadata, request, item.metadata)
        else:
            log.error("READ %d of unknown object %d", request.id, request.object)
            self._counters.add("requests_failed")
            self._answer(request.id, errno.EIO)

    def seen(self, request: Request) -> None:
        """READs that the keeper has answered, for all of it was there: what they tell about those to come."""
        self._counters.add("requests_ready", request.id)
        item = self._objects.get(request.object)
        file = item.file if item is not None else None
        self._expect(file, file.covering(request.offset, request.length) if file else range(0), request, request.id)

    def repeated(self, request: Request) -> None:
        """READs of what we knew to be read, which the keeper has answered and says no more of."""
        self._counters.add("requests_ready", request.id)
        self._count(request, request.id)

    def _blob(self, request: Request, file: CacheFile) -> None:
        frames = file.covering(request.offset, request.length)
        started = time.monotonic()
        until = self._outages.until(file, frames)
        if until <= started and not all(file.has(frame) for frame in frames):
            self._counters.add("requests_failed")
            self._counters.add("requests_denied")
            self._answer(request.id, errno.EIO)
            self._count(request, 1)
            return
        firm = until < started + self._outages.deadline  # something fails already
        waiter = Waiter(partial(self._done, request, file, started), until, firm)
        if not self._flights.want(file, frames, Priority.DEMAND, waiter, quiet=self._quiet):
            self._counters.add("requests_ready")
        self._expect(file, frames, request, 1)

    def _expect(self, file: CacheFile | None, frames: range, request: Request, count: int) -> None:
        self._read.append((file, frames, request, count))
        if not self._quiet:
            self.follow()

    def _count(self, request: Request, count: int) -> None:
        self._counters.add("requests", count)
        self._counters.add("request_bytes", request.length)

    def follow(self) -> None:
        """Note the last READs, and have fetched what they make likely."""
        while self._read:
            try:
                file, frames, request, count = self._read.popleft()
            except IndexError:  # another thread was faster
                return
            self._count(request, count)
            if file is None:
                continue
            log.debug("READ %s %d+%d frames %d-%d", file, request.offset, request.length, frames.start, frames.stop - 1)
            file.touch(frames)
            for other, frame in self._readahead.followers(file, frames):
                self._flights.want(other, (frame,), Priority.AHEAD, quiet=self._quiet)
            if ahead := self._readahead.after(file, frames):
                self._flights.want(file, ahead, Priority.AHEAD, quiet=self._quiet)

    def _done(self, request: Request, file: CacheFile, started: float, error: int) -> None:
        if not error:
            self._answer(request.id, 0)
        else:
            self._counters.add("requests_failed")
            frames = file.covering(request.offset, request.length)
            self._outages.gave_up(file, [frame for frame in frames if not file.has(frame)])
            reason = f"{os.strerror(error)} after {time.monotonic() - started:.1f} s; last error of {self._why(file)}"
            log.error("READ of %s, bytes %d+%d: %s", file, request.offset, request.length, reason)
            self.failures.append(Failure(time.time(), str(file), request.offset, request.length, reason))
            self._answer(request.id, error)
        self._counters.add_seconds("request_wait_seconds", time.monotonic() - started)

    def _metadata(self, request: Request, metadata: MetadataObject) -> None:
        try:
            metadata.fill()
        except (OSError, FormatError, IntegrityError, LoaderError) as error:
            log.error("cannot copy %s into its cachefiles object: %s", metadata.stored.path, error)
            self._counters.add("requests_failed")
            self._answer(request.id, errno.EIO)
        else:
            self._answer(request.id, 0)
