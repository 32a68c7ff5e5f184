"""Making room: what no image needs, and under a quota or on a full disk what was used least recently."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from loader.cache.layout import Layout
from loader.cache.state import State
from loader.cache.usage import BlobUsage, choose_victims, evict, measure
from loader.worker.counters import Counters
from loader.worker.mounting import Mounting
from loader.worker.objects import Objects

log = logging.getLogger(__name__)

SLACK = 64 << 20  # bytes freed beyond what is needed, so that the next miss does not evict again


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    blobs: int
    freed: int


class Collector:
    """Evicts blobs that no object is open on. One collection at a time."""

    def __init__(
        self, layout: Layout, state: State, objects: Objects, mounting: Mounting, counters: Counters, quota: int | None
    ) -> None:
        self._layout = layout
        self._state = state
        self._objects = objects
        self._mounting = mounting
        self._counters = counters
        self._quota = quota
        self._lock = threading.Lock()

    def usage(self) -> list[BlobUsage]:
        return measure(self._layout, self._state)

    def collect(self, *, needed: int | None = None, unreferenced_only: bool = True, dry_run: bool = False) -> Collected:
        """Remove blobs until `needed` bytes are free (None: all that may go)."""
        self._mounting.release_unused()
        with self._lock, self._mounting.exclusive():
            victims = choose_victims(self.usage(), self._busy, needed=needed, unreferenced_only=unreferenced_only)
            freed = sum(victim.allocated for victim in victims)
            if not dry_run:
                for victim in victims:
                    evict(self._layout, self._state, victim)
                    log.info("evicted %s (%s), %d bytes", victim.blob, victim.form.value, victim.allocated)
                self._counters.add("evicted_bytes", freed)
        return Collected(len(victims), freed)

    def _busy(self, usage: BlobUsage) -> bool:
        return self._objects.file(usage.form, usage.blob) is not None

    def make_room(self, needed: int) -> int:
        """The file system is full: evict what can go. Bytes that were freed."""
        return self.collect(needed=needed + SLACK, unreferenced_only=False).freed

    def enforce_quota(self) -> None:
        """Evict down to the quota, if there is one and it is exceeded."""
        if self._quota is None:
            return
        total = sum(usage.allocated for usage in self.usage())
        if total > self._quota:
            collected = self.collect(needed=total - self._quota, unreferenced_only=False)
            if collected.freed < total - self._quota:
                log.warning("the cache is %d bytes over its quota, all of it mounted", total - self._quota)
