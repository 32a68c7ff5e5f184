"""How long a READ may wait: measured from when the fetching began to fail, not from when the READ came.

The kernel asks many times for what one reader wants: a denied range again for every page that lies in it, and every
part of what it reads ahead by itself. Were each of these held for the whole deadline, an error would take a hundred
times as long. So the first failure of a frame, or of all fetches of its file, starts one clock for every READ of it.
When it has run out, READs fail at once, but for one now and then that tries again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from loader.cache.files import CacheFile

FORGET = 10.0  # seconds without a failure after which the next one starts anew
TRY_AGAIN = 1.0  # seconds after a failure before the next READ tries again, and how long it may take
_MANY = 4096


_Key = CacheFile | tuple[CacheFile, int]


@dataclass(slots=True)
class _Trouble:
    first: float
    last: float


class Outages:
    """What fails, and since when. Thread-safe. Times are time.monotonic()."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._lock = threading.Lock()
        self._troubles: dict[_Key, _Trouble] = {}

    def until(self, file: CacheFile, frames: Iterable[int]) -> float:
        """Until when a READ of these frames may be held; in the past if it is to fail at once."""
        now = time.monotonic()
        if not self._troubles:
            return now + self.deadline
        with self._lock:
            keys: list[_Key] = [file, *((file, frame) for frame in frames)]
            known = [self._troubles[key] for key in keys if key in self._troubles]
        troubles = [trouble for trouble in known if now - trouble.last < FORGET]
        if not troubles:
            return now + self.deadline
        end = min(trouble.first for trouble in troubles) + self.deadline
        if end > now:
            return end
        return now - 1.0 if now - max(trouble.last for trouble in troubles) < TRY_AGAIN else now + TRY_AGAIN

    def failed(self, file: CacheFile, frames: Iterable[int]) -> None:
        """These frames could not be fetched now, as if nothing of the file could."""
        self._note([file, *((file, frame) for frame in frames)])

    def gave_up(self, file: CacheFile, frames: Iterable[int]) -> None:
        """A READ of these frames was answered with an error: they are not to be had, or its deadline passed."""
        now = time.monotonic()
        self._note([(file, frame) for frame in frames], now - self.deadline)
        with self._lock:
            if trouble := self._troubles.get(file):
                trouble.last = now

    def landed(self, file: CacheFile, frame: int) -> None:
        """All is well again with this frame and with its file."""
        if self._troubles:
            with self._lock:
                self._troubles.pop(file, None)
                self._troubles.pop((file, frame), None)

    def _note(self, keys: list[_Key], since: float | None = None) -> None:
        now = time.monotonic()
        with self._lock:
            for key in keys:
                trouble = self._troubles.get(key)
                if trouble is None or now - trouble.last >= FORGET:
                    trouble = self._troubles[key] = _Trouble(now, now)
                trouble.first = min(trouble.first, since if since is not None else now)
                trouble.last = now
            if len(self._troubles) > _MANY:
                self._troubles = {key: value for key, value in self._troubles.items() if now - value.last < FORGET}
