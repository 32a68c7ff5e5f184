"""Making room: what no image needs; then, under a quota or on a full disk, what was used least recently: blobs that
nothing has mounted whole, of those that are mounted single frames (eviction.py).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loader.cache.files import CacheFile
from loader.cache.layout import Layout
from loader.cache.state import State
from loader.cache.usage import BlobUsage, choose_victims, evict, measure
from loader.worker.counters import Counters
from loader.worker.eviction import Culler, FrameEvictor, Victim
from loader.worker.mounting import Mounting
from loader.worker.objects import Objects

log = logging.getLogger(__name__)

SLACK = 64 << 20  # bytes freed beyond what is needed, so that the next miss does not evict again
SLACK_PART = 8  # but at most the 8th part of what is there, or of the quota
# A file that is complete loses its mark and with it the means to evict parts of it. So no more files do when this much
# of the quota is used: the rest is always there to be evicted from.
MAY_COMPLETE = 0.75
PATIENCE = 30.0  # seconds to hear of all objects that are open
CHECK_AFTER = 32  # the quota is looked at when its 32nd part was written
SAY_AGAIN = 60.0
LOOK = 15.0  # seconds: what the kernel keeps gets its name, and counts, when it is unmounted
CHECK_AGAIN = 2.0  # seconds after which one that could not be kept is looked at again


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    blobs: int
    freed: int


class Collector:
    """Evicts. One collection at a time."""

    def __init__(
        self, layout: Layout, state: State, objects: Objects, mounting: Mounting, frames: FrameEvictor,
        culler: Culler | None, counters: Counters, quota: int | None,
    ) -> None:  # fmt: skip
        """`culler`: where the kernel has cache files of its own."""
        self._layout = layout
        self._state = state
        self._objects = objects
        self._mounting = mounting
        self._frames = frames
        self._culler = culler
        self._counters = counters
        self._quota = quota
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._all_known = threading.Event()
        self._check_at = 0.0  # bytes written
        self._check_again = 0.0  # time.monotonic()
        self._said = float("-inf")

    def begin(self) -> None:
        """All objects that are open are known by now; before, nothing is evicted."""
        self._all_known.set()

    def usage(self) -> list[BlobUsage]:
        return measure(self._layout, self._state)

    def collect(self, *, needed: int | None = None, unreferenced_only: bool = True, dry_run: bool = False) -> Collected:
        """Remove whole blobs until `needed` bytes are free (None: all that may go)."""
        if not self._all_known.wait(PATIENCE):
            return Collected(0, 0)
        self._mounting.release_unused()
        with self._lock, self._mounting.exclusive():
            victims = choose_victims(self.usage(), self._busy, needed=needed, unreferenced_only=unreferenced_only)
            if not dry_run:
                for victim in victims:
                    self._evict_blob(victim)
        return Collected(len(victims), sum(victim.allocated for victim in victims))

    def _busy(self, usage: BlobUsage) -> bool:
        """Whether a blob is open. With cachefiles all that lies here is tables, which whoever opens a blob needs."""
        if self._culler is not None:
            return usage.referenced or bool(self._objects.files_of(usage.form, usage.blob))
        return self._objects.file(usage.form, usage.blob) is not None

    def _evict_blob(self, victim: BlobUsage) -> None:
        evict(self._layout, self._state, victim)
        log.info("evicted %s (%s), %d bytes", victim.blob, victim.form.value, victim.allocated)
        self._counters.add("evicted_bytes", victim.allocated)

    def make_room(self, needed: int) -> int:
        """The file system is full: evict what can go. Bytes that were freed."""
        try:
            return self._free(needed + min(SLACK, self._allocated() // SLACK_PART))
        except (OSError, sqlite3.OperationalError) as error:  # so full that not even this can be done
            log.error("nothing can be evicted: %s", error)
            return 0

    def _free(self, needed: int) -> int:
        freed = self.collect(needed=needed).freed
        if self._culler is not None and freed < needed:
            culled = self._culler.cull(needed - freed, {usage.blob for usage in self.usage() if usage.pinned})
            self._counters.add("evicted_bytes", culled)
            freed += culled
        if freed < needed:
            with self._lock, self._mounting.exclusive():
                freed += self._free_oldest(needed - freed)
        return freed

    def _free_oldest(self, needed: int) -> int:
        """Evict by age, blobs that are not open and frames of those that are. Frames in use are passed over."""
        usages = self.usage()
        blobs = [usage for usage in reversed(usages) if not usage.pinned and not self._busy(usage)]
        frames = self._frames.victims({usage.blob for usage in usages if usage.pinned})
        freed, position = 0, 0
        while freed < needed and (blobs or position < len(frames)):
            batch, size = dict[CacheFile, list[int]](), 0
            while (
                position < len(frames) and size < needed - freed and not (blobs and _older(blobs[-1], frames[position]))
            ):
                victim = frames[position]
                batch.setdefault(victim.file, []).append(victim.frame)
                size += victim.size
                position += 1
            for file, numbers in batch.items():
                freed += self._evict_frames(file, numbers)
            if blobs and freed < needed and (position == len(frames) or _older(blobs[-1], frames[position])):
                blob = blobs.pop()
                self._evict_blob(blob)
                freed += blob.allocated
        return freed

    def _evict_frames(self, file: CacheFile, frames: list[int]) -> int:
        freed = self._frames.evict(file, frames)
        log.debug("evicted %d bytes of %s, which is in use", freed, file)
        self._counters.add("evicted_bytes", freed)
        return freed

    # The quota

    def watch(self) -> None:
        """To be called often: has the quota looked at (by `run`) when it is due."""
        if self._quota is None or not self._all_known.is_set():
            return
        if self._counters.get("written_bytes") >= self._check_at or time.monotonic() >= self._check_again:
            self._over.set()

    def run(self, stopped: threading.Event) -> None:
        """Keep to the quota until stopped."""
        while not stopped.is_set():
            if self._over.wait(1.0):
                self._over.clear()
                try:
                    self.enforce_quota()
                except Exception:
                    log.exception("the quota could not be kept")

    def enforce_quota(self) -> None:
        """Evict down to a little less than the quota, if there is one and it is exceeded."""
        if self._quota is None:
            return
        written = self._counters.get("written_bytes")
        total = self._allocated()
        if total > self._quota:
            over = total - self._quota
            total -= self._free(over + min(SLACK, self._quota // SLACK_PART))
            if total > self._quota and time.monotonic() - self._said > SAY_AGAIN:
                self._said = time.monotonic()
                log.warning("the cache is %d bytes over its quota: the rest is pinned or in use", total - self._quota)
        self._check_at = written + max(self._quota - total, self._quota // CHECK_AFTER)
        self._check_again = time.monotonic() + (CHECK_AGAIN if total > self._quota else LOOK)

    @contextmanager
    def completing(self, file: CacheFile) -> Iterator[bool]:
        """Whether a file is complete and may lose its mark; nothing is evicted meanwhile."""
        with self._lock:
            yield file.ready.complete

    def may_complete(self) -> bool:
        """Whether a file that is complete may lose its mark."""
        return self._quota is None or self._allocated() <= self._quota * MAY_COMPLETE

    def _allocated(self) -> int:
        """Bytes of the cache on disk."""
        kernels = sum(file.allocated for file in self._culler.files()) if self._culler is not None else 0
        return kernels + sum(usage.allocated for usage in self.usage())


def _older(blob: BlobUsage, frame: Victim) -> bool:
    return blob.used < frame.used
