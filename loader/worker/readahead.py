"""What to fetch before it is asked for: the next frames of a sequential reader, as far as the link needs.

A byte that is fetched in vain costs as much as one that is needed, so the window is small: it starts when a second
READ follows the first, doubles with every further one, and is bounded by what the link holds (its bandwidth-delay
product, as measured): more does not hide the round trip any better.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from loader.cache.files import CacheFile

MAX_STREAMS = 64  # sequential readers remembered per worker
MIN_WINDOW = 64 << 10


class LinkEstimate:
    """Round trip and bandwidth of the sources, from the range requests themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round_trip = 0.05  # seconds; until something was measured
        self._bandwidth = 4e6  # bytes a second
        self._since = 0.0
        self._bytes = 0

    def note(self, length: int, seconds: float) -> None:
        """A range of `length` bytes took `seconds`, request to last byte."""
        now = time.monotonic()
        with self._lock:
            if seconds < self._round_trip:
                self._round_trip = max(seconds, 1e-4)
            else:  # forget slowly: the link may have changed
                self._round_trip += (seconds - self._round_trip) * 0.02
            self._bytes += length
            if now - self._since > 1.0:  # the first range after a pause
                self._since, self._bytes = now - seconds, length
            elapsed = now - self._since
            if elapsed >= 0.1:
                rate = self._bytes / elapsed
                self._bandwidth += (rate - self._bandwidth) * (0.5 if rate > self._bandwidth else 0.1)
                self._since, self._bytes = now, 0

    @property
    def in_flight(self) -> int:
        """Bytes that keep the link busy for a round trip."""
        return int(self._round_trip * self._bandwidth)


class ReadAhead:
    """Sequential readers, by cache file and the frame that they would read next."""

    def __init__(self, link: LinkEstimate, limit: int) -> None:
        self._link = link
        self._limit = limit
        self._lock = threading.Lock()
        self._streams: OrderedDict[tuple[CacheFile, int], int] = OrderedDict()  # → window in bytes

    def after(self, file: CacheFile, frames: range) -> range:
        """A reader wants `frames`: which frames to fetch behind them. Empty for all that is not sequential."""
        with self._lock:
            # The same frame again (a frame is larger than most READs) keeps its stream as it is.
            window = self._streams.pop((file, frames.stop), None)
            same = window is not None
            if window is None:
                window = self._streams.pop((file, frames.start), None)
            if window is None:
                window = 0
            elif not same:
                window = max(window * 2, MIN_WINDOW)
                window = min(window, self._limit, max(2 * self._link.in_flight, MIN_WINDOW))
            self._streams[file, frames.stop] = window
            if len(self._streams) > MAX_STREAMS:
                self._streams.popitem(last=False)
        return self._reaching(file, frames.stop, window)

    def _reaching(self, file: CacheFile, start: int, window: int) -> range:
        table, stop = file.table, start
        while stop < len(table) and window > 0:
            window -= table[stop].encoded_size
            stop += 1
        return range(start, stop)

    def forget(self, file: CacheFile) -> None:
        with self._lock:
            for key in [key for key in self._streams if key[0] is file]:
                del self._streams[key]
