"""How long and how wide the way to the sources is, from the range requests themselves."""

from __future__ import annotations

import threading
import time

MOMENT = 0.03  # seconds for which a reader may have to wait for what is fetched ahead


class LinkEstimate:
    """Round trip and bandwidth. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round_trip = 0.05  # seconds; until something was measured
        self._bandwidth = 4e6  # bytes a second
        self._since = 0.0
        self._bytes = 0

    def note(self, length: int, seconds: float, first: float) -> None:
        """A range of `length` bytes took `seconds`, request to last byte; its answer began after `first` seconds."""
        now = time.monotonic()
        with self._lock:
            if first < self._round_trip:
                self._round_trip = max(first, 1e-4)
            else:  # forget slowly: the link may have changed
                self._round_trip += (first - self._round_trip) * 0.02
            # What a range took, its round trip included, is never faster than the link.
            self._bandwidth = max(self._bandwidth, length / max(seconds, 1e-4))
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

    @property
    def ahead(self) -> int:
        """Bytes that may be on their way before somebody wants them: two round trips, or a moment of a fast link."""
        return max(2 * self.in_flight, int(MOMENT * self._bandwidth))
