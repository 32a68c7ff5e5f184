"""Progress bars: one line on stderr, drawn at most ten times a second, only where stderr is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from loader.cli.common import human_size
from loader.convert.progress import NoProgress, Progress, Task

_INTERVAL = 0.1
_WIDTH = 24
_CLEAR = "\r\x1b[K"


def progress_bars(quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """Bars if somebody can see them, else nothing."""
    stream = stream or sys.stderr
    return NoProgress() if quiet or not stream.isatty() else Bars(stream)


class Bars:
    """Draws the current step; what is done is left standing as one line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        """A step; see loader.convert.progress."""
        bar = _Bar(self._stream, label, total)
        try:
            yield bar
        except BaseException:
            self._stream.write(_CLEAR)
            self._stream.flush()
            raise
        bar.finish()


class _Bar:
    def __init__(self, stream: TextIO, label: str, total: int | None) -> None:
        self._stream, self._label, self._total = stream, label, total
        self._done = 0
        self._started = self._drawn = time.monotonic()
        self._lock = threading.Lock()
        self._draw(self._started)

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._drawn >= _INTERVAL:
                self._draw(now)

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        amount = f"  {human_size(self._done)}" if self._done else ""
        self._stream.write(f"{_CLEAR}{self._label}{amount} in {seconds:.1f} s\n")
        self._stream.flush()

    def _draw(self, now: float) -> None:
        self._drawn = now
        rate = self._done / max(now - self._started, 1e-3)
        line = f"{self._label}  {human_size(self._done)}" if self._done else f"{self._label} …"
        if self._total:
            share = min(self._done / self._total, 1.0)
            filled = int(share * _WIDTH)
            left = (self._total - self._done) / rate if rate else 0.0
            line = (
                f"{self._label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {100 * share:3.0f} %"
                f"  {human_size(self._done)} of {human_size(self._total)}"
                f"  {human_size(rate)}/s  {max(left, 0):.0f} s left"
            )
        self._stream.write(_CLEAR + line)
        self._stream.flush()
