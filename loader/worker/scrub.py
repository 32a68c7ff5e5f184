"""Whether what lies in the cache is still what was written; what is not is fetched again.

Encoded frames are held against the digests of their table, decoded ones against the checksums that were kept when they
were written (sums.py). An open file is marked before anything of it counts as missing, so that its readers wait.

A file that nothing has open is read by its name, which is denied while the keeper still guards it: that one is skipped.

The kernel's own files (cachefiles) are written over where a mount reads them, for nobody else can make a hole in them
while they may be read; one that nothing has mounted is culled whole. A hole in them is no damage: the kernel asks.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError
from erofs_builder.payload import Form
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.files import CacheFile, load_table
from loader.cache.kernel_files import KernelFile
from loader.cache.layout import Layout
from loader.cache.ready import ReadyMap
from loader.cache.state import State
from loader.cache.sums import Sums
from loader.cache.usage import measure
from loader.errors import LoaderError
from loader.worker.checks import Checked, Checks
from loader.worker.counters import Counters
from loader.worker.kernel_look import KernelLook, is_there
from loader.worker.link import CallError, Link
from loader.worker.mounting import Mounting
from loader.worker.objects import Objects, blob_key
from loader.worker.scrub_metadata import MetadataScrubber

log = logging.getLogger(__name__)
INTERVAL = 0.5  # seconds between two reports
_GUARDED = "{}: guarded for users of an unmounted image"
REPAIR_TIME = 600.0  # seconds for which a damaged frame is tried to be fetched without a reader


class Scrubber:
    """Checks and repairs. Thread-safe: a frame that two find damaged is fetched once."""

    def __init__(
        self, layout: Layout, state: State, objects: Objects, mounting: Mounting, flights: FlightTable,
        link: Link, counters: Counters, kernel: KernelLook | None, metadata: MetadataScrubber,
    ) -> None:  # fmt: skip
        """`kernel`: where the kernel has cache files of its own."""
        self._metadata = metadata
        self._layout, self._state, self._objects, self._mounting = layout, state, objects, mounting
        self._flights, self._link, self._counters, self._kernel = flights, link, counters, kernel

    def scrub(self, interval: float = INTERVAL) -> Iterator[dict[str, Any]]:
        """Check all of the cache; reports bytes, frames and payloads checked, damaged ones found, at last `finished`.

        `total` is what the files take on the disk, and at last what was checked of them.
        `interval`: seconds between two reports; 0: one a frame.
        """
        report: dict[str, Any] = {
            "total": 0, "checked": 0, "frames": 0, "payloads": 0, "damaged": 0, "skipped": []
        }  # fmt: skip
        parts = [*self._metadata.parts(report), *self._own(report), *self._kernels(report)]
        report["finished"] = False
        said = 0.0
        for found in itertools.chain.from_iterable(parts):
            report["checked"] += found.size
            report[found.unit] += 1
            report["damaged"] += found.damaged
            if time.monotonic() - said >= interval:
                said = time.monotonic()
                yield dict(report)
        yield report | {"total": report["checked"], "finished": True}

    def _own(self, report: dict[str, Any]) -> Iterator[Checks]:
        """Our own cache files: what is found in each, once it is iterated over."""
        for item in measure(self._layout, self._state):
            if self._layout.data(item.blob, item.form).exists():  # else it is but a table
                report["total"] += item.allocated
                yield self._blob(item.form, item.blob, report["skipped"])

    def _kernels(self, report: dict[str, Any]) -> Iterator[Checks]:
        """The same for the kernel's."""
        if self._kernel is None:
            return
        named = self._kernel.files()
        report["skipped"] += [f"{file}: new, until it is unmounted" for file in self._kernel.nameless(named)]
        for found in named:
            report["total"] += found.allocated
            yield self._kernels_file(self._kernel, found, report["skipped"])

    def check(self, file: CacheFile, frames: Iterable[int]) -> int:
        """Check some frames of an open file, repair what is wrong; how many there were."""
        if file.writer is None:
            return 0
        if not file.trusted:  # cachefiles lets nobody read through its descriptor
            wrong = [frame for frame in frames if file.ready[frame]]
        else:
            with file.writer.descriptor() as fd:
                wrong = [frame for frame in frames if _is_wrong(file, fd, frame)]
        if wrong:
            self._repair(file, wrong)
        return len(wrong)

    def _blob(self, form: Form, blob: Digest, skipped: list[str]) -> Checks:
        file = self._objects.file(form, blob)
        try:
            if file is not None:
                for frame in [frame for frame in range(len(file.table)) if file.ready[frame]]:
                    yield Checked(file.place(file.table[frame])[1], self.check(file, [frame]) > 0)
            elif self._is_guarded(form, blob):
                skipped.append(_GUARDED.format(blob_key(form, blob)))
            else:
                yield from self._closed_blob(form, blob, skipped)
        except (CallError, OSError, FormatError) as error:
            log.error("cannot check %s/%s: %s", form.value, blob.hex, error)
            skipped.append(f"{form.value}/{blob.hex}: {error}")

    def _is_guarded(self, form: Form, blob: Digest) -> bool:
        """Whether the keeper denies what is read by path: a lazily unmounted image may still be used."""
        try:
            return bool(self._link.call("guards", name=blob_key(form, blob))[0]["guards"])
        except CallError as error:
            if error.errno != errno.ENOSYS:  # an older keeper
                raise
            return False

    def _closed_blob(self, form: Form, blob: Digest, skipped: list[str]) -> Checks:
        table = load_table(self._layout, form, blob)
        directory = self._layout.blob(blob, form)
        fd = os.open(directory / "data", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        ready = ReadyMap(directory, len(table), self._layout.tmp, table=table.identity)
        sums = Sums(directory, len(table)) if form is Form.DECODED else None
        file = CacheFile(f"{form.value}/{blob.hex}", form, table, ready, trusted=True, sums=sums)
        try:
            for frame in [frame for frame in range(len(table)) if ready[frame]]:
                with self._mounting.exclusive():
                    if self._objects.file(form, blob) is not None:
                        return  # opened meanwhile: its bits are another map's now
                    wrong = not _intact(file, fd, frame)
                    if wrong and self._is_guarded(form, blob):  # since a moment ago: it was opened, and released
                        skipped.append(_GUARDED.format(file))
                        return
                    if wrong:
                        self._found(file, [frame])
                        ready.clear([frame])
                yield Checked(file.place(table[frame])[1], wrong)
        finally:
            os.close(fd)
            file.close()

    def _kernels_file(self, kernel: KernelLook, found: KernelFile, skipped: list[str]) -> Checks:
        try:
            with kernel.descriptor(found) as fd:
                if (file := kernel.opened(found)) is None:
                    yield from self._culled_if_wrong(kernel, found, fd)
                    return
                for frame in [frame for frame in range(len(file.table)) if file.ready[frame]]:
                    wrong = [frame] if _is_wrong(file, fd, frame) else []
                    if wrong and file.writer is not None:
                        self._repair(file, wrong)
                    yield Checked(file.place(file.table[frame])[1], bool(wrong))
        except (OSError, FormatError) as error:
            log.error("cannot check %s: %s", found.name, error)
            skipped.append(f"{found.name}: {error}")

    def _culled_if_wrong(self, kernel: KernelLook, found: KernelFile, fd: int) -> Checks:
        """Nothing has it mounted: what is wrong of it cannot be written over."""
        with kernel.closed_file(found) as file:
            wrong = []
            for frame in [frame for frame in range(len(file.table)) if file.ready[frame]]:
                if not _intact(file, fd, frame):
                    wrong.append(frame)
                yield Checked(file.place(file.table[frame])[1], frame in wrong[-1:])
            if not wrong:
                return
            with self._mounting.exclusive():
                opened = kernel.opened(found)
                if opened is None:
                    self._found(file, wrong)
                    if not kernel.cull(found):
                        log.error("%s could not be culled: the kernel has it in use", file)
                    return
            if repairable := [frame for frame in wrong if _is_wrong(opened, fd, frame)]:
                self._repair(opened, repairable)  # mounted in the meantime

    def _repair(self, file: CacheFile, wrong: list[int]) -> None:
        self._found(file, wrong)
        try:
            if file.trusted and file.completed and file.object is not None:
                self._link.call("mark", object=file.object)
                file.completed = False
        except (LoaderError, OSError) as error:
            log.error("cannot mark %s again: %s", file, error)  # its readers get errors until the frame is there
        file.forget(wrong)
        waiter = Waiter(lambda error: self._repaired(file, wrong, error), time.monotonic() + REPAIR_TIME)
        self._flights.want(file, wrong, Priority.AHEAD, waiter)

    def _found(self, file: CacheFile, wrong: list[int]) -> None:
        self._counters.add("damaged_frames", len(wrong))
        log.error("%s: frames %s are damaged on disk and will be fetched again", file, wrong[:20])

    def _repaired(self, file: CacheFile, wrong: list[int], error: int) -> None:
        if error:
            log.error("%s: the damaged frames could not be fetched: %s", file, os.strerror(error))
        else:
            log.warning("%s: %d damaged frames are repaired", file, len(wrong))


def _is_wrong(file: CacheFile, fd: int, number: int) -> bool:
    """Looked at twice: it may have been evicted, and have come again, in the middle of the first time."""
    return all(file.ready[number] and not _intact(file, fd, number) and file.ready[number] for _ in range(2))


def _intact(file: CacheFile, fd: int, number: int) -> bool:
    frame = file.table[number]
    offset, size = file.place(frame)
    if not file.trusted and not is_there(fd, offset, size):
        return True  # the kernel has thrown it away, and asks
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)  # look at the disk, where memory does not hold it dirty
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        log.error("%s: frame %d: %s", file, number, error)
        return False
    if file.decoded:
        return file.sums is not None and file.sums.fits(number, data)
    return Digest.of(data).raw == frame.digest
