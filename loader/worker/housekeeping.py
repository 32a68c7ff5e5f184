"""What a worker does for its open files by the clock: sync them, and take the mark off those that are whole.

A file that has just become whole does not wait for the clock: without the mark its readers ask nobody any more.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time

from erofs_builder.payload import Form
from loader.cache.files import CacheFile
from loader.cache.state import State
from loader.errors import LoaderError
from loader.worker.collector import Collector
from loader.worker.link import Link
from loader.worker.mounting import Mounting
from loader.worker.objects import Objects
from loader.worker.proof import prove
from loader.worker.readahead import ReadAhead

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL = 5.0  # seconds
LEAST_INTERVAL = 0.1  # seconds between two looks at what is whole


class Housekeeper:
    """The work of one thread."""

    def __init__(
        self, objects: Objects, collector: Collector, mounting: Mounting, readahead: ReadAhead, state: State, link: Link
    ) -> None:
        self._objects = objects
        self._collector = collector
        self._mounting = mounting
        self._readahead = readahead
        self._state = state
        self._link = link
        self._whole = threading.Event()

    def hurry(self) -> None:
        """A file has become whole, or all ends. Returns at once; from any thread."""
        self._whole.set()

    def run(self, stopped: threading.Event) -> None:
        """Keep house until `stopped` is set."""
        due = time.monotonic() + CHECKPOINT_INTERVAL
        while not stopped.wait(LEAST_INTERVAL):
            self._whole.wait(max(0.0, due - time.monotonic()))
            self._whole.clear()
            if stopped.is_set():
                return
            try:
                if time.monotonic() < due:
                    self.complete()
                else:
                    due = time.monotonic() + CHECKPOINT_INTERVAL
                    self.look_after()
            except Exception:
                log.exception("housekeeping failed")

    def look_after(self) -> None:
        """All that is done by the clock."""
        used = [file for file in self._objects.files() if not file.safe]
        for file in used:
            checkpoint(file)
        if used:
            self._note_use(used)
        self.complete()
        self._mounting.release_unused()
        self._readahead.keep({file.blob.raw for file in self._objects.files()})
        self._readahead.rest_pays(self._collector.may_complete())

    def complete(self) -> None:
        """Take the mark off files that are whole."""
        for file in self._objects.files():
            if file.trusted and file.ready.complete and not file.completed and self._collector.may_complete():
                self._complete(file)

    def _complete(self, file: CacheFile) -> None:
        """Sync it first: what the disk did not take has to be known while the file can still be served."""
        checkpoint(file)
        if not file.safe or file.refuted or (file.form is Form.ENCODED and not prove(file)):
            return
        try:
            with self._collector.completing(file) as complete:
                if complete:
                    self._link.call("complete", object=file.object)
                    file.completed = True
        except (LoaderError, OSError) as error:
            log.warning("cannot complete %s: %s", file, error)

    def _note_use(self, files: list[CacheFile]) -> None:
        try:
            self._state.touch_blobs([(file.blob, file.form) for file in files])
        except sqlite3.OperationalError as error:
            log.error("cannot record what was used last: %s", error)


def checkpoint(file: CacheFile) -> None:
    """Sync what is ready of a file, as far as that is possible."""
    try:
        file.checkpoint()
    except OSError as error:
        if error.errno != errno.EBADF:
            log.error("cannot sync %s: %s", file, error)
