"""What happened, counted. Names are what `erofs-loader stats` and /metrics show."""

from __future__ import annotations

import threading
from collections import Counter

NAMES = {
    "requests": "READs that the kernel sent",
    "requests_ready": "READs answered without a fetch",
    "requests_failed": "READs answered with an error",
    "requests_denied": "READs of what was just found not to be had, answered with an error at once",
    "requests_expired": "READs that failed because their deadline passed",
    "request_bytes": "bytes that the kernel asked for",
    "request_wait_seconds": "time that READs waited, added up",
    "fetches": "ranges fetched from a source",
    "fetched_bytes": "bytes fetched from sources, metadata included",
    "fetch_seconds": "time spent in range requests, added up",
    "fetch_retries": "fetches repeated after a transient error",
    "frames_demanded": "frames fetched because a reader waited",
    "frames_ahead": "frames fetched ahead of a reader",
    "frames_background": "frames fetched by a prefetch",
    "written_bytes": "bytes written into cache files",
    "corrupt_frames": "frames whose bytes were not what their digest says; never written",
    "damaged_frames": "frames that were damaged on disk, by the kernel's word or by `scrub`",
    "damaged_payloads": "images' metadata files that were damaged on disk",
    "source_errors": "failed range requests, all kinds",
    "write_errors": "failed writes into cache files",
    "evicted_bytes": "bytes removed from the cache",
}


class Counters:
    """Thread-safe sums."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys((name for name in NAMES if name.endswith("_seconds")), 0.0)

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._values[name] += amount

    def get(self, name: str) -> int:
        """One counter that is no time."""
        return self._values[name]

    def add_seconds(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds

    def snapshot(self) -> dict[str, int | float]:
        """All counters, also those that are still zero."""
        with self._lock:
            values = {**self._values, **{name: round(seconds, 3) for name, seconds in self._seconds.items()}}
        return {name: values.get(name, 0) for name in NAMES}
