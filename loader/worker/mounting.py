"""Mounting and unmounting, on both planes, and what a restart does about the mounts that are on record."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.frames import FrameTable
from erofs_builder.payload import Form, Payload
from loader.cache.claims import FlightTable
from loader.cache.files import CacheFile, another_table, has_another_table, prepare_blob, store_table
from loader.cache.layout import Layout
from loader.cache.ready import boot_id
from loader.cache.state import ImageRecord, MountRecord, State
from loader.errors import BusyError, LoaderError, NotFoundError
from loader.keeper.protocol import PRESENCE
from loader.worker.images import Images
from loader.worker.link import CallError, Link, as_loader_error
from loader.worker.objects import Objects, blob_key
from loader.worker.payloads import DamagedPayloadError
from loader.worker.sharing import AUTO, OFF, PageSharing
from loader.worker.starts import Starts
from mounts.mountinfo import mountinfo

log = logging.getLogger(__name__)
_Choose = Callable[[memoryview], str | None]  # metadata to the domain that its mount joins

# The encoded form must not be mounted with the kernel's default strategy: it keeps compressed pages of its own, and a
# page that was read through a hole stays bad after the hole was filled.
MOMENT = 1.0  # seconds
PATIENCE = 30.0  # seconds until the keeper has said what is open
OPTIONS = {Form.ENCODED: ["cache_strategy=disabled"], Form.DECODED: []}


class Mounting:
    """Mounts by target. One mount or unmount at a time; fetching metadata is done before, by `Images`."""

    def __init__(
        self, plane: str, domain: str, layout: Layout, state: State, images: Images, objects: Objects,
        flights: FlightTable, link: Link, announce: Callable[[Payload], object], starts: Starts, pages: PageSharing,
    ) -> None:  # fmt: skip
        self.plane = plane
        self.domain = domain
        self._layout = layout
        self._state = state
        self._images = images
        self._objects = objects
        self._flights = flights
        self._link = link
        self._announce = announce
        self._starts = starts
        self._pages = pages
        self._lock = threading.Lock()
        self._boot = boot_id().hex()
        self._held = Counter[tuple[Digest, Form]]()
        self._all_known = threading.Event()

    def begin(self) -> None:
        """All objects that are open are known by now; before, nothing is mounted, for its files may be among them."""
        self._all_known.set()

    def _await_objects(self) -> None:
        if not self._all_known.wait(PATIENCE):
            raise BusyError("the worker has not heard yet what is mounted", hint="try again in a moment")

    def exclusive(self) -> threading.Lock:
        """Held while nothing is mounted or unmounted."""
        return self._lock

    def mount(
        self, image: ImageRecord, target: str, form: Form, name: str = "", domain: str | None = None
    ) -> MountRecord:
        """Mount a known image; the same again is fine. BusyError if something else is there.

        `name` is what whoever mounts called it ("" for a digest), `domain` the one he wants it to share page cache in.
        """
        return self._mount(
            image, target, form, lambda erofs: self._pages.domain(form, erofs, name, image.digest, domain), domain
        )

    def _mount(self, image: ImageRecord, target: str, form: Form, choose: _Choose, wanted: str | None) -> MountRecord:
        try:
            return self._mount_stored(image, target, form, choose, wanted)
        except DamagedPayloadError:
            self._images.payloads.mend(image.digest, form)  # asks the registry: with no lock held
            return self._mount_stored(image, target, form, choose, wanted)

    def _mount_stored(
        self, image: ImageRecord, target: str, form: Form, choose: _Choose, wanted: str | None
    ) -> MountRecord:
        self._await_objects()
        with self._lock:
            existing = self._existing(target)
            if existing is not None:
                if (existing.image, existing.form) != (image.digest, form):
                    raise BusyError(f"{target}: {existing.image} ({existing.form.value}) is mounted there")
                if wanted not in (None, AUTO, existing.domain or OFF):
                    raise BusyError(f"{target}: it is mounted there in the domain {existing.domain or OFF}")
                return existing
            path, payload = self._images.payloads.load(image.digest, form)
            domain = choose(payload.erofs_view)
            try:
                if self.plane == "fanotify":
                    mount_files = partial(self._mount_files, image, target, form, path, payload.tables)
                    record = _preferably(mount_files, domain, must=wanted not in (None, AUTO))
                else:
                    self._store_tables(image, form, payload.tables)
                    record = self._mount_fsid(image, target, form)
                    opened = [self._objects.files_of(form, table.blob_digest) for table in payload.tables]
                    self._starts.fetch(image.digest, [files[-1] if files else None for files in opened])
            except CallError as error:
                raise as_loader_error(error, f"mounting {image.name} on {target}") from None
            self._state.add_mount(record, [table.blob_digest for table in payload.tables])
        self._announce(payload)  # takes longer than the mount itself where there are many files
        return record

    def _existing(self, target: str) -> MountRecord | None:
        record = self._state.mount_at(target)
        if record is None:
            return None
        if record.boot == self._boot and is_mounted(target):
            return record
        self._state.remove_mount(target)
        return None

    def _mount_files(
        self, image: ImageRecord, target: str, form: Form, path: Path, tables: tuple[FrameTable, ...],
        domain: str | None,
    ) -> MountRecord:  # fmt: skip
        files = self._open_blobs(image, form, tables)
        self._starts.fetch(image.digest, files)
        self._link.call(
            "mount",
            source=str(self._pages.announced(path) if domain else path),
            devices=[str(self._layout.data(table.blob_digest, form)) for table in tables],
            options=[*OPTIONS[form], *(["inode_share"] if domain else [])],
            target=target,
            domain_id=domain or "",
            objects=[file.object for file in files],
            pause=self._starts.pause(image.digest, files),
        )
        return MountRecord(target, image.digest, form, "fanotify", None, time.time(), self._boot, domain)

    def _store_tables(self, image: ImageRecord, form: Form, tables: tuple[FrameTable, ...]) -> None:
        """cachefiles: for the OPENs of a mount. An image that was just added may have lost its own to a quota."""
        for table in tables:
            files = self._objects.files_of(form, table.blob_digest)
            if any(file.table.identity != table.identity for file in files):
                raise another_table(table, self._state.sharers(image.digest, table.blob_digest))
        for table in tables:
            store_table(self._layout, form, table)

    def _open_blobs(self, image: ImageRecord, form: Form, tables: tuple[FrameTable, ...]) -> list[CacheFile]:
        """fanotify: an image's cache files. IntegrityError, before anything is done, if one belongs to another image
        that has another frame table of it."""
        for table in tables:
            if self._belongs_to_another(image, form, table):
                raise another_table(table, self._state.sharers(image.digest, table.blob_digest))
        return [self._open_blob(form, table) for table in tables]

    def _belongs_to_another(self, image: ImageRecord, form: Form, table: FrameTable) -> bool:
        """Whether a blob's file is in use, or pinned, and filled by another table."""
        blob = table.blob_digest
        file = self._objects.file(form, blob)
        if file is not None and file.object is not None:
            differs = file.table.identity != table.identity
        else:
            file, differs = None, has_another_table(self._layout, form, table)
        if not differs:
            return False
        pinned = any(other.pinned for other in self._state.sharers(image.digest, blob))
        if pinned or blob_key(form, blob) in self._objects.unserved:
            return True
        return file is not None and not self._gives_way(file)

    def _gives_way(self, file: CacheFile) -> bool:
        """Release a file that is open, and that nobody uses; whether it was. The kernel itself may use it for a moment,
        for writeback or the end of an unmount."""
        key = (file.blob, file.form)
        if key in self._state.mounted_blobs() or self._held[key] > 0:
            return False
        until = time.monotonic() + MOMENT
        while not self._unused(file):
            if time.monotonic() > until:
                return False
            time.sleep(MOMENT / 20)
        return self._release(file) > 0

    def _open_blob(self, form: Form, table: FrameTable) -> CacheFile:
        """The blob's cache file, marked: before the mount, or its holes would read as they are."""
        file = self._objects.file(form, table.blob_digest)
        if file is not None and file.object is not None:
            return file
        path = prepare_blob(self._layout, form, table)
        key = blob_key(form, table.blob_digest)
        size = table.decoded_size if form is Form.DECODED else table.blob_size
        result, fd = self._link.call("create", name=key, path=str(path), form=form.value, size=size)
        if fd is None:
            raise LoaderError(f"the keeper opened {key}, but sent no descriptor")
        number, presence = int(result["object"]), result.get(PRESENCE)
        return self._objects.add_fanotify(number, form, table.blob_digest, fd, presence, table)

    @contextmanager
    def opened(self, image: ImageRecord, form: Form) -> Iterator[list[CacheFile]]:
        """An image's cache files, open meanwhile, mounted or not. LoaderError where only the kernel can open them."""
        tables = self._images.payloads.sound(image.digest, form).tables
        keys = [(table.blob_digest, form) for table in tables]
        self._await_objects()
        with self._lock:
            if self.plane == "fanotify":
                files = self._open_blobs(image, form, tables)
            else:
                known = {table.identity for table in tables}
                files = [file for blob, _ in keys for file in self._objects.files_of(form, blob)]
                files = [file for file in files if file.table.identity in known]
                if keys and not files:
                    raise LoaderError(f"{image.name} is not mounted", hint="cachefiles opens a blob when it is mounted")
            self._held.update(keys)
        try:
            yield files
        finally:
            with self._lock:
                self._held.subtract(keys)

    def _mount_fsid(self, image: ImageRecord, target: str, form: Form) -> MountRecord:
        used = {mount.fsid for mount in self._state.mounts()}
        base = image_fsid(image.digest, form)
        fsid = next(name for name in (base, *(f"{base}.{n}" for n in range(1, len(used) + 2))) if name not in used)
        self._link.call(
            "mount",
            source="none",
            devices=[],
            options=OPTIONS[form],
            target=target,
            fsid=fsid,
            domain_id=self.domain,
            objects=[],
            pause=self._starts.pause(image.digest),
        )
        return MountRecord(target, image.digest, form, "cachefiles", fsid, time.time(), self._boot)

    def umount(self, target: str, *, lazy: bool = False) -> None:
        """Unmount; NotFoundError if nothing of ours is mounted there, BusyError while it is used."""
        with self._lock:
            if self._state.mount_at(target) is None:
                raise NotFoundError(f"{target}: no mount of this daemon", hint="`erofs-loader list` shows its mounts")
            if is_mounted(target):
                try:
                    self._link.call("umount", target=target, lazy=lazy)
                except CallError as error:
                    refused = as_loader_error(error, "not unmounted")
                    if isinstance(refused, BusyError):
                        refused.hint = "something in it is open; --lazy detaches it now and lets go with the last user"
                    raise refused from None
            self._state.remove_mount(target)
        self.release_unused()

    def release_unused(self) -> int:
        """fanotify: give back the marks of blobs that no file system of the kernel has open; how many."""
        if self.plane != "fanotify":
            return 0
        released = 0
        with self._lock:
            wanted = self._state.mounted_blobs()
            for file in self._objects.files():
                key = (file.blob, file.form)
                if key not in wanted and not self._held[key] and self._unused(file):
                    released += self._release(file)
        return released

    def _unused(self, file: CacheFile) -> bool:
        """Whether our descriptor is the only one: the kernel grants a write lease on nothing less.

        A mount that was unmounted lazily, or lives on in another mount namespace, still has the file open.
        """
        if file.writer is None:
            return False
        try:
            with file.writer.descriptor() as fd:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def _release(self, file: CacheFile) -> int:
        number = file.object
        if number is None:
            return 0
        self._flights.forget(file)
        try:
            file.checkpoint()
            self._link.call("release", object=number)
        except (CallError, OSError) as error:
            log.warning("cannot release %s: %s", file, error)
            return 0
        self._objects.close(number)
        self._starts.forget(file)
        return 1

    def adopt(self, held: list[Any]) -> None:
        """Record what the keeper has mounted and our records do not know: they were lost."""
        known = {record.target for record in self._state.mounts()}
        for entry in held:
            target = str(entry["target"])
            if target in known or not is_mounted(target):
                continue
            fsid = str(entry.get("fsid") or "") or None
            place = Path(str(entry["source"]))  # images/HEX/FORM.payload
            name = fsid.partition(".")[0] if fsid else f"{place.parent.name}-{place.stem}"
            hexadecimal, _, form = name.partition("-")
            image = self._state.find_id(hexadecimal)
            if image is None or form not in (item.value for item in Form):
                log.error("what is mounted on %s is not known: %s", target, name)
                continue
            domain = None if fsid else str(entry.get("domain_id") or "") or None
            record = MountRecord(target, image, Form(form), self.plane, fsid, time.time(), self._boot, domain)
            self._state.add_mount(record)
            log.warning("recorded the mount of %s on %s again", image, target)

    def recover(self, fenced: list[Any]) -> None:
        """After a start: forget mounts that are gone, make those of before a reboot again."""
        for record in self._state.mounts():
            if record.boot == self._boot:
                if is_mounted(record.target):
                    self._remember(record)
                else:
                    log.info("%s is not mounted any more", record.target)
                    self._state.remove_mount(record.target)
                continue
            self._state.remove_mount(record.target)
            image = self._state.image(record.image)
            if image is None or record.plane != self.plane:
                continue
            try:
                self._mount(
                    image,
                    record.target,
                    record.form,
                    partial(self._pages.again, record.form, domain=record.domain),
                    None,
                )
                log.info("mounted %s on %s again", image.name, record.target)
            except (LoaderError, FormatError, IntegrityError, OSError) as error:
                log.error("cannot mount %s on %s again: %s", image.name, record.target, error)
                self._state.add_mount(record)
        if fenced:
            log.error("fenced, since their blobs went unserved: %s", fenced)

    def _remember(self, record: MountRecord) -> None:
        """A mount that an earlier worker made."""
        try:
            self._announce(self._images.payloads.sound(record.image, record.form))
        except (LoaderError, FormatError, IntegrityError, OSError) as error:
            log.warning("%s: %s", record.target, error)


def _preferably(mount: Callable[[str | None], MountRecord], domain: str | None, *, must: bool) -> MountRecord:
    """Mount in a domain, or, unless it must be in there, without one where the kernel refuses that."""
    try:
        return mount(domain)
    except (CallError, OSError) as error:
        if domain is None or must:
            raise
        log.warning("page cache is not shared in %s: %s", domain, error)
        return mount(None)


def image_fsid(image: Digest, form: Form) -> str:
    """The fsid of an image in a form; other forms of it are other metadata."""
    return f"{image.hex}-{form.value}"


def is_mounted(target: str) -> bool:
    """Whether an EROFS is mounted right there."""
    return any(entry.target == target for entry in mountinfo("erofs"))
