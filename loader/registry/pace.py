"""The one rule for how slowly an answer may come, its head, its body, whoever reads it.

A wait without a byte may last as long as the timeout says. From the first byte on the waits are added up, and each
time that they are a timeout together, there must have come 4 KiB for each second of them: else a server could hold a
reader for ever with a byte now and then. What we take to use the bytes does not count.
"""

from __future__ import annotations

import time

SLOWEST = 4096  # bytes a second
SLICES = 4  # waits that make up a timeout where the kernel keeps the time: a stall is noticed a quarter late at most


class Pace:
    """TimeoutError for a stall, and for what comes so slowly that another server is the better hope.

    Around each receive: `start`, then `came` with the number of bytes, or `nothing` if it gave up waiting. `timeout` is
    in seconds; None: any pace is good.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._began = False
        self._seconds = 0.0  # waited, and
        self._bytes = 0  # come, since the last judgement
        self._asked = self._heard = time.monotonic()

    def start(self) -> None:
        """A receive begins."""
        self._asked = time.monotonic()

    def came(self, count: int, more: bool = True) -> None:
        """So many bytes came; `more`: and others are waited for."""
        self._heard = time.monotonic()
        if not self._began:  # how long the server thought about its answer is no pace
            self._began = True
            return
        self._seconds += self._heard - self._asked
        self._bytes += count
        if self._timeout is None or self._seconds < self._timeout:
            return
        if more and self._bytes < SLOWEST * self._seconds:
            raise TimeoutError(f"{self._bytes} bytes in {self._seconds:.0f} s")
        self._seconds, self._bytes = 0.0, 0

    def nothing(self) -> None:
        """Nothing came in a slice of the timeout."""
        now = time.monotonic()
        self._seconds += now - self._asked
        if self._timeout is not None and now - self._heard >= self._timeout:
            raise TimeoutError("nothing came")
