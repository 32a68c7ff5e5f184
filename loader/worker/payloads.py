"""Metadata payloads on this node: stored once, checked each time before they are used, mended where the disk lets them
rot.

The kernel believes what is in a payload's file. So what is damaged is written over in place, where the mounts that read
it find the right bytes, and not replaced.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK
from erofs_builder.errors import IntegrityError
from erofs_builder.payload import Form, Payload, decode_payload
from loader.cache.files import store_table
from loader.cache.layout import Layout, replace_file
from loader.cache.state import ImageRecord, State
from loader.errors import NotFoundError
from loader.worker.counters import Counters
from loader.worker.sharing import announced_bytes, shared_copy

log = logging.getLogger(__name__)


class DamagedPayloadError(IntegrityError):
    """A stored payload is not what was stored."""


class Payloads:
    """The payloads of all images. Thread-safe.

    `fetch(image, form)` gives an image's payload from its registry, held against its manifest.
    """

    def __init__(
        self, layout: Layout, state: State, counters: Counters, fetch: Callable[[ImageRecord, Form], bytes]
    ) -> None:
        self._layout, self._state, self._counters, self._fetch = layout, state, counters, fetch
        self._fresh = threading.local()  # .payload: a digest and the payload that was just stored for it
        self._mending = threading.Lock()

    def has(self, image: Digest, form: Form) -> bool:
        """Whether one is stored; not whether it is whole."""
        return form in self._state.payloads(image) and self._layout.payload(image, form).exists()

    def store(self, image: Digest, form: Form, data: bytes, payload: Payload) -> None:
        """Keep a verified payload, and its frame tables with their blobs."""
        for table in payload.tables:
            store_table(self._layout, form, table)
        replace_file(self._layout.payload(image, form), data, self._layout.tmp)
        self._fresh.payload = image, payload

    def load(self, image: Digest, form: Form) -> tuple[Path, Payload]:
        """The stored payload and its path, checked against the digest that was recorded with it.

        What this thread has just stored is not read again: it is about to be mounted, mostly. DamagedPayloadError: it
        is to be mended; NotFoundError: none is here.
        """
        path = self._layout.payload(image, form)
        fresh, self._fresh.payload = getattr(self._fresh, "payload", None), None
        if fresh is not None and (fresh[0], fresh[1].form) == (image, form):
            return path, fresh[1]
        return path, decode_payload(self._read(image, form))

    def sound(self, image: Digest, form: Form) -> Payload:
        """The same, mended first if it is damaged: that asks its registry. Not with a lock held."""
        try:
            return self.load(image, form)[1]
        except DamagedPayloadError:
            return decode_payload(self.mend(image, form))

    def read(self, image: Digest, form: Form) -> bytes:
        """The bytes of a payload, mended first if they are damaged."""
        try:
            return self._read(image, form)
        except DamagedPayloadError:
            return self.mend(image, form)

    def mend(self, image: Digest, form: Form) -> bytes:
        """Fetch a damaged payload again, and write it over what is wrong of the stored one."""
        with self._mending:
            try:
                return self._read(image, form)  # another thread was faster
            except DamagedPayloadError as error:
                log.error("%s: fetched again", error)
            self._counters.add("damaged_payloads")
            record = self._state.image(image)
            if record is None:
                raise NotFoundError(f"{image} is not known here")
            data = self._fetch(record, form)
            self._expected(image, form).verify(data, f"the {form.value} metadata of {record.name}")
            _write_over(self._layout.payload(image, form), data)
            log.warning("%s: its %s metadata is repaired", record.name, form.value)
            return data

    def stored(self) -> Iterator[tuple[Digest, Form]]:
        """What is here."""
        for image in self._state.images():
            for form in self._state.payloads(image.digest):
                if self.has(image.digest, form):
                    yield image.digest, form

    def size(self, image: Digest, form: Form) -> int:
        """Bytes of a payload's files."""
        path = self._layout.payload(image, form)
        return sum(file.stat().st_size for file in (path, shared_copy(path)) if file.exists())

    def check(self, image: Digest, form: Form) -> bool:
        """Look at what is on the disk; whether that was damaged. LoaderError, IntegrityError: and cannot be mended."""
        path = self._layout.payload(image, form)
        shared = shared_copy(path)
        for file in (path, shared):
            _forget_pages(file)
        damaged = False
        try:
            data = self._read(image, form)
        except DamagedPayloadError:
            data, damaged = self.mend(image, form), True
        if shared.exists() and shared.read_bytes() != (right := announced_bytes(data)):
            log.error("%s is damaged: written again", shared)
            self._counters.add("damaged_payloads")
            _write_over(shared, right)
            damaged = True
        return damaged

    def _read(self, image: Digest, form: Form) -> bytes:
        path, expected = self._layout.payload(image, form), self._expected(image, form)
        try:
            data = path.read_bytes()
            expected.verify(data, str(path))
        except FileNotFoundError:
            raise _not_here(image, form) from None
        except (IntegrityError, OSError) as error:
            raise DamagedPayloadError(f"damaged metadata of {image}: {error}") from None
        return data

    def _expected(self, image: Digest, form: Form) -> Digest:
        expected = self._state.payloads(image).get(form)
        if expected is None:
            raise _not_here(image, form)
        return expected


def _not_here(image: Digest, form: Form) -> NotFoundError:
    return NotFoundError(
        f"{image}: its {form.value} metadata is not here", hint=f"erofs-loader add --form {form.value} IMAGE"
    )


def _forget_pages(path: Path) -> None:
    """Have the next read look at the disk, where memory does not hold it dirty."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _write_over(path: Path, data: bytes) -> None:
    """Make a file's bytes right, in place, where they are not."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_size != len(data):
            os.ftruncate(fd, len(data))
        for offset in range(0, len(data), BLOCK):
            right = data[offset : offset + BLOCK]
            if not _holds(fd, offset, right) and os.pwrite(fd, right, offset) != len(right):
                raise OSError(f"{path}: a block could not be written")
        os.fsync(fd)
    finally:
        os.close(fd)


def _holds(fd: int, offset: int, right: bytes) -> bool:
    try:
        return os.pread(fd, len(right), offset) == right
    except OSError:  # a sector that cannot be read: writing it often helps
        return False
