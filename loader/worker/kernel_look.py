"""cachefiles: a look into the kernel's own cache files, for `scrub`; its descriptors can only be written.

They are ordinary files, that a process without capabilities may not open (they have no mode bits): the keeper lends a
descriptor for reading. A file has its name once it was unmounted; before, nobody can look into it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from erofs_builder.erofs.layout import BLOCK
from erofs_builder.errors import FrameTableError
from loader.cache.files import CacheFile, load_table
from loader.cache.kernel_files import KernelFile
from loader.cache.layout import Layout
from loader.cache.ready import ReadyMap
from loader.cache.sums import Sums
from loader.errors import LoaderError
from loader.worker.eviction import PATIENCE, Culler
from loader.worker.link import Link
from loader.worker.objects import Objects, StoredMetadata, object_name


class KernelLook:
    """Finds and opens them."""

    def __init__(self, layout: Layout, culler: Culler, objects: Objects, link: Link) -> None:
        self._layout, self._culler, self._objects, self._link = layout, culler, objects, link

    def files(self) -> list[KernelFile]:
        """Those of blobs that an image here needs."""
        return [found for found in self._culler.files() if found.blob is not None]

    def metadata(self) -> list[tuple[KernelFile, StoredMetadata]]:
        """Those of metadata that is here."""
        named = [(found, self._objects.find_metadata(found.cookie)) for found in self._culler.files()]
        return [(found, stored) for found, stored in named if found.blob is None and stored is not None]

    def mend(self, found: KernelFile, right: bytes, wrong: Iterable[int]) -> None:
        """Write these blocks (their offsets) of metadata over where a mount reads it; throw the file away where none
        does. OSError: neither could be done."""
        if (mounted := self._objects.metadata_of(f"{found.volume}/{found.cookie}")) is None:
            if not self.cull(found):
                raise OSError(errno.EBUSY, f"{found.name} is in use, and could not be culled")
            return
        for offset in wrong:
            mounted.writer.write(offset, right[offset : offset + BLOCK])

    def opened(self, found: KernelFile) -> CacheFile | None:
        """The cache file of a mount that reads this one."""
        return self._objects.open_file(f"{found.volume}/{found.cookie}")

    def nameless(self, named: list[KernelFile]) -> list[CacheFile]:
        """Those that are open and cannot be looked into yet."""
        known = {f"{found.volume}/{found.cookie}" for found in named}
        return [file for file in self._objects.files() if file.key not in known]

    @contextmanager
    def descriptor(self, found: KernelFile) -> Iterator[int]:
        """A descriptor for reading; OSError if the keeper does not give one."""
        try:
            _, fd = self._link.call("look", PATIENCE, directory=str(found.directory), name=found.name)
        except LoaderError as error:
            raise OSError(getattr(error, "errno", 0), str(error)) from None
        assert fd is not None
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def closed_file(self, found: KernelFile) -> Iterator[CacheFile]:
        """What is known of one that nothing has open; FrameTableError where that is nothing."""
        assert found.blob is not None and found.form is not None
        directory = self._layout.object(object_name(found.volume, found.cookie))
        if not directory.is_dir():
            raise FrameTableError(f"nothing is known of {found.volume}/{found.cookie}")
        table = load_table(self._layout, found.form, found.blob)
        ready = ReadyMap(directory, len(table), self._layout.tmp, table=table.identity)
        sums = Sums(directory, len(table)) if found.decoded else None
        file = CacheFile(
            f"{found.volume}/{found.cookie}", found.form, table, ready, trusted=False, sums=sums
        )  # its writer is missing: nothing can be written
        try:
            yield file
        finally:
            file.close()

    def cull(self, found: KernelFile) -> bool:
        """Throw one away; whether it went."""
        return self._culler.cull_file(found)


def is_there(fd: int, offset: int, size: int) -> bool:
    """Whether the kernel will read this range without asking: none of it is a hole."""
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE) >= offset + size
    except OSError:  # beyond the end
        return False
