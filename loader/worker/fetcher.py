"""From the registry into a cache file, meant to be read straight down:

    take a run of frames → ask for its range → each frame as it comes: verify → [decode] → write → ready → answer
                                                                                                     whoever waits

Threads, since everything that takes time (sockets, sha256, zstd, pwrite) releases the interpreter's lock. Where frames
of the blob were just fetched, C does all of that (csrc/take.c): one call for each frame.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.errors import IntegrityError
from erofs_builder.frames import Frame
from loader.cache.claims import Flight, FlightTable, Priority, Run
from loader.cache.files import CacheFile
from loader.errors import LoaderError, NotFoundError, TransientRegistryError
from loader.registry.again import Asked, Taken
from loader.worker.counters import Counters
from loader.worker.link_estimate import LinkEstimate
from loader.worker.outages import Outages
from loader.worker.sources import RangeStream, Sources

log = logging.getLogger(__name__)

BACKOFF = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # seconds before the next attempt
MAX_REFUSALS = 2  # rounds through all servers after which wrong or missing bytes are believed
MAX_HELD = 64  # frames kept in memory while the disk is full; what is more is fetched again
# cachefiles says ENOBUFS when the file system is nearly full, or when the object is gone.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS)
_COUNTED = {
    Priority.DEMAND: "frames_demanded",
    Priority.AHEAD: "frames_ahead",
    Priority.BACKGROUND: "frames_background",
}


class _Once:
    """A call that is made once, however often it is asked for."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class _Request(NamedTuple):
    """What a source was asked for."""

    source: str
    offset: int
    length: int
    priority: Priority
    started: float  # time.monotonic()


class Fetcher:
    """The fetching threads. `make_room(bytes)` is asked once when a file system is full, `whole()` called as soon as
    all of a file is there."""

    def __init__(
        self, flights: FlightTable, sources: Sources, counters: Counters, link: LinkEstimate,
        make_room: Callable[[int], int], outages: Outages, whole: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._flights = flights
        self._sources = sources
        self._counters = counters
        self._link = link
        self._make_room = make_room
        self._outages = outages
        self._whole = whole
        self._local = threading.local()
        self._threads: list[threading.Thread] = []
        self.last_errors: dict[str, str] = {}  # by source, for `status`

    def start(self, connections: int) -> None:
        for number in range(connections):
            thread = threading.Thread(target=self._serve, name=f"fetch-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self) -> None:
        while run := self._flights.take():
            self.fetch(run)

    def fetch(self, run: Run, sent: Callable[[], None] = lambda: None) -> None:
        """Fetch a run that was taken, to whatever end. `sent` is called while it is waited for: once, early."""
        told = _Once(sent)
        try:
            if left := self._fetch_again(run, told):
                told()
                self._fetch(left, run.priority)
        except Exception:  # a bug must not leave readers waiting
            log.exception("fetching %s failed in an unexpected way", run.flights[0].file)
            self._flights.fail(run.flights, errno.EIO)
        finally:
            told()
            self._flights.finish(run)

    def _fetch_again(self, run: Run, sent: Callable[[], None]) -> list[Flight]:
        """Fetch a run as others of its blob were just fetched, with as little as can be before its request goes out and
        behind the last byte of each frame. What it gives back is left: to be fetched anew."""
        file = run.flights[0].file
        held = any(flight.held is not None for flight in run.flights)
        source = None if held else self._sources.choose(file.blob)
        if source is None:
            return run.flights
        offset, length = _span(run.flights)
        request = _Request(source, offset, length, run.priority, time.monotonic())
        asked = self._sources.ask_again(source, file.blob, offset, length)
        if asked is None:
            return run.flights
        with closing(asked):
            sent()
            return self._take_all(deque(run.flights), request, asked)

    def _take_all(self, left: deque[Flight], request: _Request, asked: Asked) -> list[Flight]:
        table = left[0].file.table
        while (taken := self._take(left[0], frame := table[left[0].frame], asked)) is not None:
            flight = left.popleft()
            self._have(flight, frame, taken, request)
            if not left:
                self._account(request.length, taken.came - request.started, taken.began - request.started)
                return []
        return self._resume(left, request, asked)

    def _take(self, flight: Flight, frame: Frame, asked: Asked) -> Taken | None:
        """Its frame, received, checked, decoded where its file holds it so, and mostly written."""
        self._flights.arrives(flight)
        file, writer = flight.file, flight.file.writer
        if writer is None or not writer.buffered:
            return asked.take(frame, file.decoded)
        try:
            with writer.descriptor() as fd:
                return asked.take(frame, file.decoded, fd)
        except OSError:  # closed
            return asked.take(frame, file.decoded)

    def _have(self, flight: Flight, frame: Frame, taken: Taken, request: _Request) -> None:
        if taken.written:
            self._written(flight, frame, taken.data, request.priority)
        elif taken.right:
            self._put(flight, frame, taken.data, request.priority)
        else:
            self._store(flight, frame, taken.data, request)

    def _resume(self, left: deque[Flight], request: _Request, asked: Asked) -> list[Flight]:
        """Go on with an answer that is slow, comes through TLS, or is odd."""
        blob = left[0].file.blob
        response = asked.resume()
        if response is None:
            self._sources.forget_words(request.source, blob)
            return list(left)
        begun = asked.began or time.monotonic()
        try:
            with self._sources.stream(request.source, blob, request.offset, response) as stream:
                self._read_all(left, request, stream, begun)
        except (LoaderError, OSError) as error:
            self._failed(list(left), request, error)
        return []

    def _fetch(self, flights: list[Flight], priority: Priority) -> None:
        if held := [flight for flight in flights if flight.held is not None]:
            for flight in held:  # the others come again by themselves
                data, flight.held = flight.held, None
                self._put(flight, flight.file.table[flight.frame], data or b"", priority)
            return
        file = flights[0].file
        source = self._sources.choose(file.blob)
        if source is None:
            log.error("%s: no image that holds this blob is known any more", file)
            self._flights.fail(flights, errno.EIO)
            return
        offset, length = _span(flights)
        request = _Request(source, offset, length, priority, time.monotonic())
        left = deque(flights)
        try:
            with self._sources.open_range(source, file.blob, offset, length) as stream:
                self._read_all(left, request, stream, time.monotonic())
        except NotFoundError as error:
            self._refused(list(left), source, error)
        except (LoaderError, OSError, IntegrityError) as error:
            self._failed(list(left), request, error)

    def _read_all(self, left: deque[Flight], request: _Request, stream: RangeStream, begun: float) -> None:
        """Take one frame after another off `left` as it comes. `begun`: when the answer had."""
        while left:
            flight = left[0]
            frame = flight.file.table[flight.frame]
            self._flights.arrives(flight)
            encoded = stream.read(frame.encoded_size)
            left.popleft()
            if not left:
                self._account(request.length, time.monotonic() - request.started, begun - request.started)
            self._store(flight, frame, encoded, request)

    def _account(self, length: int, seconds: float, first: float) -> None:
        """A whole range has come, its beginning after `first` seconds."""
        self._counters.add("fetches")
        self._counters.add("fetched_bytes", length)
        self._counters.add_seconds("fetch_seconds", seconds)
        self._link.note(length, seconds, first)

    def _store(self, flight: Flight, frame: Frame, encoded: bytes | memoryview, request: _Request) -> None:
        """Verify a frame's bytes, decode them where the file holds them so, and write them."""
        try:
            Digest(frame.digest).verify(encoded, f"frame {frame.number} of {flight.file}")
            data = self._decoded(frame, encoded) if flight.file.decoded else encoded
        except IntegrityError as error:
            self._corrupt(flight, request.source, error)
        else:
            self._put(flight, frame, data, request.priority)

    def _corrupt(self, flight: Flight, source: str, error: IntegrityError) -> None:
        self._counters.add("corrupt_frames")
        self._sources.distrust(source, flight.file.blob)
        self._refused([flight], source, error)

    def _put(self, flight: Flight, frame: Frame, data: bytes | memoryview, priority: Priority) -> None:
        """Write verified bytes. On a full disk whoever waits goes on waiting; any other failure is final."""
        try:
            self._write(flight, frame, data)
        except OSError as error:
            if flight.file.writer is None:  # closed meanwhile, and nobody is left who waits
                self._flights.fail([flight], errno.EIO)
                return
            self._counters.add("write_errors")
            self.last_errors[str(flight.file)] = f"cannot write frame {frame.number}: {error}"
            log.error("cannot write frame %d of %s: %s", frame.number, flight.file, error)
            if error.errno not in _FULL:
                self._flights.fail([flight], errno.EIO)
                return
            if len(self._flights) <= MAX_HELD:
                flight.held = bytes(data)
            self._flights.retry([flight], BACKOFF[min(flight.attempts, len(BACKOFF)) - 1])
            return
        self._landed(flight, len(data), priority)

    def _written(self, flight: Flight, frame: Frame, data: memoryview, priority: Priority) -> None:
        """A frame's bytes were written already; where there is no room to say so, all is done as for any other."""
        try:
            flight.file.written(frame, data)
        except OSError:
            self._put(flight, frame, data, priority)
        else:
            self._landed(flight, len(data), priority)

    def _landed(self, flight: Flight, size: int, priority: Priority) -> None:
        """A frame is ready: whoever waits goes on, then all else is noted."""
        self._flights.land(flight)
        if flight.file.ready.complete and flight.file.trusted and not flight.file.completed:
            self._whole()
        self.last_errors.pop(flight.file.key, None)
        self._counters.add(_COUNTED[priority])
        self._counters.add("written_bytes", size)
        self._outages.landed(flight.file, flight.frame)

    def _write(self, flight: Flight, frame: Frame, data: bytes | memoryview) -> None:
        try:
            flight.file.write(frame, data)
        except OSError as error:
            if error.errno not in _FULL or not self._make_room(len(data)):
                raise
            flight.file.write(frame, data)

    def _decoded(self, frame: Frame, encoded: bytes | memoryview) -> bytes:
        """A verified frame's plain bytes, never more than the frame table says."""
        decompressor: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 23)
        try:
            size = zstandard.frame_content_size(encoded)
            if size != frame.decoded_size:
                raise IntegrityError(f"frame {frame.number} says it decodes to {size} bytes, not {frame.decoded_size}")
            return decompressor.decompress(encoded)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"frame {frame.number} does not decode: {error}") from None

    def _refused(self, flights: list[Flight], source: str, error: Exception) -> None:
        """Bytes are wrong or not there: ask the other sources, then believe it."""
        self._note(source, error)
        self._sources.blame(source)
        rounds = MAX_REFUSALS * self._sources.places(flights[0].file.blob)
        for flight in flights:
            flight.refusals += 1
        final = [flight for flight in flights if flight.refusals >= rounds]
        if final:
            log.error("giving up frames of %s: %s", flights[0].file, error)
            self._flights.fail(final, errno.EIO)
        self._flights.retry([flight for flight in flights if flight.refusals < rounds], 0.0)

    def _failed(self, flights: list[Flight], request: _Request, error: Exception) -> None:
        """The source cannot answer now: hold the readers and try the next one, later and later."""
        self._note(request.source, error)
        self._counters.add("fetch_retries")
        if not flights:  # closing failed
            return
        attempts = flights[0].attempts
        self._outages.failed(flights[0].file, [flight.frame for flight in flights])
        delay = 0.0
        if attempts % max(1, self._sources.count(flights[0].file.blob)) == 0:
            delay = BACKOFF[min(attempts, len(BACKOFF)) - 1]
        if isinstance(error, TransientRegistryError) and error.retry_after:
            delay = max(delay, min(error.retry_after, 30.0))
        log.warning(
            "%s: bytes %d+%d from %s: %s; attempt %d, next in %.2f s",
            flights[0].file, request.offset, request.length, request.source, error, attempts, delay,
        )  # fmt: skip
        self._flights.retry(flights, delay)

    def why(self, file: CacheFile) -> str:
        """What went wrong last with this file or the sources of its blob."""
        known = [(name, self.last_errors.get(name)) for name in (str(file), *self._sources.names(file.blob))]
        return "; ".join(f"{name}: {error}" for name, error in known if error) or "no source is known to have failed"

    def _note(self, source: str, error: Exception) -> None:
        self._counters.add("source_errors")
        self.last_errors[source] = str(error)


def _span(flights: list[Flight]) -> tuple[int, int]:
    """Offset and length in the blob of adjacent frames."""
    table = flights[0].file.table
    offset, last = table[flights[0].frame].encoded_offset, table[flights[-1].frame]
    return offset, last.encoded_offset + last.encoded_size - offset
