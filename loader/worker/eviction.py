"""Taking single frames of mounted images away so that no reader can tell:

reserve the frame's flight (nobody fetches it, who asks for it waits) → clear its bit, durably (who asks from now on
finds no frame) → ask the keeper whether a thread waits for it or may still be reading it → if not: punch a hole, else
set the bit again → end the flight: who waits now gets it fetched

What EROFS has in its page cache stays there, and is right. A file that is complete has lost its mark, so its readers
are not seen: nothing of it is taken until nothing has it mounted (collector.py sees to it that there is enough else).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from erofs_builder.digest import Digest
from loader.cache.claims import FlightTable
from loader.cache.files import CacheFile
from loader.cache.kernel_files import KernelFile, by_age, kernel_files
from loader.cache.layout import Layout
from loader.cache.state import State
from loader.cache.writer import ALIGNMENT, BufferedWriter
from loader.errors import LoaderError
from loader.keeper.protocol import MOST_RANGES
from loader.worker.link import CallError, Link
from loader.worker.objects import Objects, object_name, tags

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for a word of the keeper


class Culler:
    """Evicts whole files of cachefiles that nothing has mounted; the kernel knows which."""

    def __init__(self, layout: Layout, state: State, link: Link) -> None:
        self._layout, self._state, self._link = layout, state, link

    def files(self) -> list[KernelFile]:
        blobs = {blob for image in self._state.images() for blob, _ in image.blobs}
        return kernel_files(self._layout.root / "cachefiles", tags(blobs))

    def cull(self, needed: int, pinned: set[Digest]) -> int:
        """Cull, by age, until `needed` bytes are free or nothing is left that may go. Bytes that were freed."""
        freed = 0
        for file in by_age(self.files(), self._state.last_used(), pinned):
            if freed >= needed:
                break
            if self.cull_file(file):
                freed += file.allocated
        return freed

    def cull_file(self, file: KernelFile) -> bool:
        """Cull one; whether it went."""
        try:
            self._link.call("cull", PATIENCE, directory=str(file.directory), name=file.name)
        except CallError as error:
            if error.errno not in (errno.EBUSY, errno.ESTALE, errno.ENOENT):
                log.warning("cannot cull %s: %s", file.name, error)
            return False
        shutil.rmtree(self._layout.object(object_name(file.volume, file.cookie)), ignore_errors=True)
        log.info("culled %s, %d bytes", file.name, file.allocated)
        return True


class Victim(NamedTuple):
    """A frame that may go; `used` in seconds since the epoch, 0 if it is no use to anybody."""

    used: int
    file: CacheFile
    frame: int

    @property
    def size(self) -> int:
        return self.file.place(self.file.table[self.frame])[1]


class FrameEvictor:
    """Evicts frames of open files. One caller at a time."""

    def __init__(self, objects: Objects, flights: FlightTable, link: Link) -> None:
        self._objects, self._flights, self._link = objects, flights, link
        self._said = False

    def victims(self, pinned: set[Digest]) -> list[Victim]:
        """What may go, least recently used first; nothing of blobs in `pinned`."""
        found = [
            Victim(file.used[frame], file, frame)
            for file in self._objects.files()
            if file.trusted and not file.completed and file.blob not in pinned and self._possible(file)
            for frame in range(len(file.table))
            if file.ready[frame]
        ]
        found.sort(key=lambda victim: victim.used)
        leftovers = [
            Victim(0, file, frame) for file in {victim.file: None for victim in found} for frame in _leftovers(file)
        ]
        return leftovers + found

    def evict(self, file: CacheFile, frames: list[int]) -> int:
        """Take these frames away, but those that somebody uses just now. Bytes that were freed."""
        freed = 0
        try:
            for start in range(0, len(frames), MOST_RANGES):
                idle = self._idle(file, frames[start : start + MOST_RANGES])
                freed += self._take(file, idle) if idle else 0
        except (LoaderError, OSError) as error:
            log.warning("nothing of %s can be evicted: %s", file, error)
        return freed

    def _take(self, file: CacheFile, frames: list[int]) -> int:
        flights = self._flights.reserve(file, frames)
        reserved = [flight.frame for flight in flights]
        ready = {frame for frame in reserved if file.ready[frame]}
        taken: list[int] = []
        try:
            file.forget(reserved)
            taken = self._idle(file, reserved)
            return sum(_punch(file, first, last) for first, last in _runs(taken))
        finally:
            file.restore(ready.difference(taken))
            for flight in flights:
                if file.ready[flight.frame]:
                    self._flights.land(flight)
            self._flights.retry([flight for flight in flights if not file.ready[flight.frame]], 0.0)

    def _idle(self, file: CacheFile, frames: list[int]) -> list[int]:
        """Which of them nobody uses, by the keeper's word."""
        if file.object is None or not frames:
            return []
        places = [file.place(file.table[frame]) for frame in frames]
        ranges = [(offset, offset + size) for offset, size in places]
        result, _ = self._link.call("idle", PATIENCE, object=file.object, ranges=ranges)
        return [frames[int(number)] for number in result["idle"]]

    def _possible(self, file: CacheFile) -> bool:
        """Whether a frame can become a hole: not where the file system's blocks are larger than ours."""
        try:
            if file.writer is None:
                return False
            with file.writer.descriptor() as fd:
                block = os.fstatvfs(fd).f_bsize
        except OSError:
            return False
        if block > ALIGNMENT and not self._said:
            self._said = True
            log.warning("blocks of %d bytes: nothing of a mounted image is evicted on this file system", block)
        return block <= ALIGNMENT


def _runs(frames: list[int]) -> Iterator[tuple[int, int]]:
    """The first and last of each run of neighbours."""
    first = last = None
    for frame in sorted(frames):
        if first is None or last is None:
            first = last = frame
        elif frame == last + 1:
            last = frame
        else:
            yield first, last
            first = last = frame
    if first is not None and last is not None:
        yield first, last


def _punch(file: CacheFile, first: int, last: int) -> int:
    start, end = file.place(file.table[first])[0], sum(file.place(file.table[last]))
    if not isinstance(file.writer, BufferedWriter):
        return 0
    file.writer.punch(start, end - start)
    return end - start


def _leftovers(file: CacheFile) -> Iterator[int]:
    """Frames that have bytes, but no bit: of a worker that was killed between the two."""
    if file.writer is None:
        return
    position = 0
    with file.writer.descriptor() as fd:
        while position < file.size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
                position = os.lseek(fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            for frame in file.covering(start, min(position, file.size) - start):
                if not file.ready[frame]:
                    yield frame
