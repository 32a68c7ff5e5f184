"""The scrub that nobody asked for: every few days all of the cache is checked, slowly, while no reader waits.

In the encoded form the kernel itself finds what rots when it is read. In the decoded form nothing else does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loader.cache.layout import Layout, replace_file

log = logging.getLogger(__name__)

DAY = 86400.0
RATE = 32 << 20  # bytes a second
LOOK = 60.0  # seconds between two looks at whether one is due
_GIVE_WAY = 0.1  # seconds, while a reader waits


class Patrol:
    """`scrub()` gives reports (scrub.py); `idle()` says whether no reader waits. `days` 0: never."""

    def __init__(
        self, layout: Layout, scrub: Callable[[], Iterator[dict[str, Any]]], idle: Callable[[], bool], days: float
    ) -> None:
        self._record: Path = layout.root / "records" / "scrubbed"
        self._tmp = layout.tmp
        self._scrub, self._idle, self._days = scrub, idle, days

    @property
    def last(self) -> float | None:
        """When the last one ended, in seconds since the epoch."""
        try:
            return min(float(self._record.read_text()), time.time())
        except (OSError, ValueError):
            return None

    def run(self, stopped: threading.Event) -> None:
        """Check when it is time, until stopped. The first time counts from the first start."""
        if not self._days:
            return
        if self.last is None:
            self._note()
        while not stopped.wait(min(LOOK, self._days * DAY / 10)):
            try:
                if time.time() - (self.last or 0.0) >= self._days * DAY:
                    self.check(stopped)
            except Exception:
                log.exception("the cache could not be checked")

    def check(self, stopped: threading.Event) -> None:
        """Check everything once."""
        started, report = time.monotonic(), dict[str, Any]()
        for report in self._scrub():
            behind = report["checked"] / RATE - (time.monotonic() - started)
            if stopped.wait(max(0.0, behind)):
                return
            while not self._idle() and not stopped.wait(_GIVE_WAY):
                pass
        checked = report["frames"], report["payloads"], report["damaged"]
        log.info("checked %d frames and the metadata of %d images: %d were damaged", *checked)
        self._note()

    def _note(self) -> None:
        replace_file(self._record, f"{time.time():.3f}\n".encode(), self._tmp)
