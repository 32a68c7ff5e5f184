"""The kernel's objects, as the keeper names them, and the cache files behind them."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError
from erofs_builder.frames import FrameTable
from erofs_builder.payload import Form, device_tag
from loader.cache.files import CacheFile, bind_object, load_table
from loader.cache.layout import Layout
from loader.cache.ready import ReadyMap
from loader.cache.sums import Sums
from loader.cache.writer import BufferedWriter, DirectWriter, Writer
from loader.keeper.presence import Presence
from loader.keeper.protocol import PRESENCE

log = logging.getLogger(__name__)


class StoredMetadata(NamedTuple):
    """An image's metadata on this node. `read` gives all of it, checked."""

    path: Path
    read: Callable[[], bytes]


class MetadataObject:
    """cachefiles: an image's metadata, which lies whole on this node and is copied in at the first READ."""

    def __init__(self, key: str, stored: StoredMetadata, writer: DirectWriter) -> None:
        self.key = key
        self.stored = stored
        self.writer = writer
        self._lock = threading.Lock()
        self._written = False

    @property
    def size(self) -> int:
        return self.stored.path.stat().st_size

    def fill(self) -> None:
        """Write all of it, once. IntegrityError, LoaderError: it is damaged, and cannot be had again."""
        with self._lock:
            if not self._written:
                data = memoryview(self.stored.read())
                for offset in range(0, len(data), 1 << 20):
                    self.writer.write(offset, data[offset : offset + (1 << 20)])
                self._written = True


@dataclass(slots=True)
class Object:
    """One object of the kernel."""

    number: int
    plane: str
    file: CacheFile | None = None
    metadata: MetadataObject | None = None

    def close(self) -> None:
        if self.metadata is not None:
            self.metadata.writer.close()
        if self.file is not None and self.file.object == self.number:
            self.file.detach()


class Objects:
    """Objects by number, cache files by key. Thread-safe; a descriptor belongs to its object and is closed with it.

    `find_metadata(fsid)` gives an image's metadata, `find_tag(tag)` the blob and form of a device slot's tag.
    """

    def __init__(
        self,
        layout: Layout,
        find_metadata: Callable[[str], StoredMetadata | None],
        find_tag: Callable[[str], tuple[Form, Digest] | None],
    ) -> None:
        self._layout = layout
        self.find_metadata = find_metadata
        self._find_tag = find_tag
        self._lock = threading.Lock()
        self._objects: dict[int, Object] = {}
        self._files: dict[str, CacheFile] = {}
        self.unserved = set[str]()  # keys of files that are mounted, but could not be opened here

    def get(self, number: int) -> Object | None:
        return self._objects.get(number)

    def files(self) -> list[CacheFile]:
        """All open cache files."""
        with self._lock:
            return list(self._files.values())

    def file(self, form: Form, blob: Digest) -> CacheFile | None:
        """fanotify: the open cache file of a blob."""
        return self.open_file(blob_key(form, blob))

    def open_file(self, key: str) -> CacheFile | None:
        return self._files.get(key)

    def metadata_of(self, key: str) -> MetadataObject | None:
        """cachefiles: the metadata that is open as VOLUME/COOKIE."""
        with self._lock:
            found = (item.metadata for item in self._objects.values())
            return next((metadata for metadata in found if metadata is not None and metadata.key == key), None)

    def files_of(self, form: Form, blob: Digest) -> list[CacheFile]:
        """Every open cache file of a blob in a form: one with fanotify, one per volume with cachefiles."""
        with self._lock:
            return [file for file in self._files.values() if file.blob == blob and file.form is form and file.writer]

    def add_fanotify(
        self, number: int, form: Form, blob: Digest, fd: int, presence: int | None = None,
        table: FrameTable | None = None,
    ) -> CacheFile:  # fmt: skip
        """A marked cache file of ours; its descriptor was opened before the mark.

        `presence` is the descriptor of the keeper's bitmap. Both are taken over in any case. `table` is read from the
        cache if it is not at hand.
        """
        shared = _open_presence(presence)
        key, writer = blob_key(form, blob), BufferedWriter(fd)
        try:
            table = table or load_table(self._layout, form, blob)
            file = self._files.get(key)
            if file is None or file.table.identity != table.identity:
                ready = ReadyMap(self._layout.blob(blob, form), len(table), self._layout.tmp, table=table.identity)
                sums = Sums(self._layout.blob(blob, form), len(table)) if form is Form.DECODED else None
                file = CacheFile(key, form, table, ready, trusted=True, sums=sums)
        except BaseException:
            writer.close()
            raise
        self._install(Object(number, "fanotify", file), file, writer)
        file.share(shared)
        return file

    def add_cachefiles(self, number: int, volume: str, cookie: str, fd: int) -> int:
        """An object that the kernel opened; its size, or -errno. The descriptor is taken over in any case."""
        writer = DirectWriter(fd)
        try:
            stored = self.find_metadata(cookie)
            if stored is not None:
                metadata = MetadataObject(f"{volume}/{cookie}", stored, writer)
                self._install(Object(number, "cachefiles", None, metadata), None, writer)
                return metadata.size
            file = self._open_cachefiles(volume, cookie)
        except (FormatError, OSError) as error:
            log.error("cannot open %s in %s: %s", cookie, volume, error)
            writer.close()
            return -errno.EIO
        if file is None:
            writer.close()
            return -errno.ENOENT
        self._install(Object(number, "cachefiles", file), file, writer)
        return file.size

    def _open_cachefiles(self, volume: str, cookie: str) -> CacheFile | None:
        found = self._find_tag(cookie)
        if found is None:
            return None
        form, blob = found
        table = load_table(self._layout, form, blob)
        directory = self._layout.object(object_name(volume, cookie))
        bind_object(directory, table, self._layout.tmp)
        ready = ReadyMap(directory, len(table), self._layout.tmp, table=table.identity)
        sums = Sums(directory, len(table)) if form is Form.DECODED else None
        return CacheFile(f"{volume}/{cookie}", form, table, ready, trusted=False, sums=sums)

    def _install(self, item: Object, file: CacheFile | None, writer: Writer) -> None:
        """Make an object known; one of the same number or cache file ends."""
        with self._lock:
            ended, old = [self._objects.pop(item.number, None)], None
            if file is not None:
                old = self._files.get(file.key)
                if old is not None and old.object is not None:
                    ended.append(self._objects.pop(old.object, None))
                self._files[file.key] = file
            self._objects[item.number] = item
        for previous in ended:
            if previous is not None:
                previous.close()
        if file is not None:
            if old is not None and old is not file:
                old.close()
            file.writer, file.object = writer, item.number

    def close(self, number: int) -> CacheFile | None:
        """The object is gone; its cache file, if it was one, is closed and returned."""
        with self._lock:
            item = self._objects.pop(number, None)
            file = item.file if item else None
            last = file is not None and self._files.get(file.key) is file and file.object == number
            if file is not None and last:
                del self._files[file.key]
        if item is not None:
            item.close()
        if file is not None and last:
            file.close()
        return file

    def add_from_keeper(self, body: dict[str, Any], fd: int) -> None:
        """An OBJECT packet: what an earlier worker had open."""
        number = int(body["object"])
        try:
            if body["plane"] == "cachefiles":
                size = self.add_cachefiles(number, str(body["volume"]), str(body["cookie"]), fd)
                if size < 0:
                    log.error("object %d (%s) is not known any more", number, body["cookie"])
                return
            form_name, _, blob_hex = str(body["name"]).partition("/")
            blob = Digest(bytes.fromhex(blob_hex))
            self.unserved.add(str(body["name"]))
            presence = body.get(PRESENCE)
            if not self._is_current(Form(form_name), blob, fd):
                for each in (fd, presence):
                    if each is not None:
                        os.close(each)
                raise OSError(errno.ESTALE, "another file is in its place")
            file = self.add_fanotify(number, Form(form_name), blob, fd, presence)
            file.completed = bool(body.get("complete"))
            self.unserved.discard(file.key)
        except (FormatError, KeyError, ValueError, OSError) as error:
            log.error("object %d cannot be served: %s", number, error)

    def _is_current(self, form: Form, blob: Digest, fd: int) -> bool:
        """Whether the descriptor is of the file that lies in the cache: only of that the frame table is known."""
        try:
            own, current = os.fstat(fd), self._layout.data(blob, form).stat()
        except OSError:
            return False
        return (own.st_dev, own.st_ino) == (current.st_dev, current.st_ino)


def _open_presence(fd: int | None) -> Presence | None:
    """The bitmap behind a descriptor, which is closed. None: the keeper asks for every READ then."""
    if fd is None:
        return None
    try:
        return Presence(fd, writable=True)
    except (OSError, ValueError) as error:
        log.error("cannot map what the keeper sent: %s", error)
        return None
    finally:
        os.close(fd)


def blob_key(form: Form, blob: Digest) -> str:
    """The name of a blob's cache file with the keeper, and of its directory."""
    return f"{form.value}/{blob.hex}"


def object_name(volume: str, cookie: str) -> str:
    """The name of the directory in which the bitmaps of a cachefiles object lie."""
    return hashlib.sha256(f"{volume}\0{cookie}".encode()).hexdigest()


def tags(blobs: set[Digest]) -> dict[str, tuple[Form, Digest]]:
    """Device slot tags of blobs in both forms."""
    return {device_tag(form, blob): (form, blob) for blob in blobs for form in Form}
