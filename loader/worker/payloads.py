"""Metadata payloads: verified when they come, checked on this node's disk each time before they are used, mended there.

The kernel believes what is in a payload's file. So what is damaged is written over in place, where the mounts that read
it find the right bytes, and not replaced.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, IntegrityError
from erofs_builder.payload import ALIGNMENT, Form, Payload, decode_payload, device_tag
from loader.artifact import PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.cache.files import another_table, has_another_table, store_table
from loader.cache.layout import Layout, replace_file, write_over
from loader.cache.state import ImageRecord, State
from loader.convert.load import decompress
from loader.errors import NotFoundError
from loader.registry.base import Descriptor
from loader.worker.counters import Counters
from loader.worker.sharing import announced_bytes, shared_copy

log = logging.getLogger(__name__)

MAX_PAYLOAD = 1 << 30  # decompressed; an image of ten million files stays below
_SUPERBLOCK = 1024


class DamagedPayloadError(IntegrityError):
    """A stored payload is not what was stored."""


class Payloads:
    """The payloads of all images. Thread-safe.

    `fetch(image, form)` gives an image's payload from its registry, held against its manifest.
    """

    def __init__(
        self, layout: Layout, state: State, counters: Counters, fetch: Callable[[ImageRecord, Form], bytes],
        one_table: bool = False,
    ) -> None:  # fmt: skip
        self._one_table = one_table
        self._layout, self._state, self._counters, self._fetch = layout, state, counters, fetch
        self._fresh = threading.local()  # .payload: a digest and the payload that was just stored for it
        self._mending = threading.Lock()

    def has(self, image: Digest, form: Form) -> bool:
        """Whether one is stored; not whether it is whole."""
        return form in self._state.payloads(image) and self._layout.payload(image, form).exists()

    def store(self, image: Digest, form: Form, data: bytes, payload: Payload) -> None:
        """Keep a verified payload, and its frame tables with their blobs. IntegrityError, with cachefiles, if another
        image has another one: whose an OPEN is cannot be told there."""
        if self._one_table:
            for table in payload.tables:
                others = self._state.sharers(image, table.blob_digest)
                if others and has_another_table(self._layout, form, table):
                    raise another_table(table, others)
        for table in payload.tables:
            store_table(self._layout, form, table, over=self._one_table)
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
            write_over(self._layout.payload(image, form), data)
            log.warning("%s: its %s metadata is repaired", record.name, form.value)
            return data

    def stored(self) -> Iterator[tuple[Digest, Form]]:
        """What is here."""
        for image in self._state.images():
            for form in self._state.payloads(image.digest):
                if self.has(image.digest, form):
                    yield image.digest, form

    def size(self, image: Digest, form: Form) -> int:
        """Bytes of a payload's files; 0 for what has just been removed."""
        path, total = self._layout.payload(image, form), 0
        for file in (path, shared_copy(path)):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
        return total

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
            write_over(shared, right)
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


def verified_payload(
    compressed: bytes, descriptor: Descriptor, artifact: Artifact, form: Form
) -> tuple[bytes, Payload]:
    """Decompress a metadata payload, bounded, and hold it against the manifest that it belongs to."""
    descriptor.digest.verify(compressed, "metadata payload")
    size = payload_size(descriptor)
    data = decompress(compressed, size, "metadata payload")
    payload = decode_payload(data)
    if payload.form is not form:
        raise ArtifactError(f"metadata payload: it is of the {payload.form.value} form, not {form.value}")
    sizes = {blob.digest: blob.size for blob in artifact.blobs}
    for table in payload.tables:
        if sizes.pop(table.blob_digest, None) != table.blob_size:
            raise ArtifactError(
                f"metadata payload: the manifest does not list blob {table.blob_digest} in its size, once"
            )
    expected = [device_tag(form, table.blob_digest) for table in payload.tables]
    if device_tags(payload.erofs_view) != expected:
        raise IntegrityError("metadata payload: device slots and frame tables do not match")
    return data, payload


def payload_size(descriptor: Descriptor) -> int:
    """Bytes of a payload when it is decompressed, as its manifest says. ArtifactError: that cannot be."""
    text = descriptor.annotations.get(PAYLOAD_SIZE_ANNOTATION, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12) or not 0 < int(text) <= MAX_PAYLOAD:
        raise ArtifactError(f"metadata descriptor: {PAYLOAD_SIZE_ANNOTATION} is {text[:40]!r}")
    if int(text) % ALIGNMENT:
        raise ArtifactError(f"metadata descriptor: {PAYLOAD_SIZE_ANNOTATION} is not a multiple of {ALIGNMENT}")
    return int(text)


def device_tags(erofs: bytes | memoryview) -> list[str]:
    """The tags of a superblock's device slots, in order."""
    if len(erofs) < _SUPERBLOCK + 128 or erofs[_SUPERBLOCK : _SUPERBLOCK + 4] != b"\xe2\xe1\xf5\xe0":
        raise ArtifactError("metadata payload: no EROFS superblock")
    count, slot = struct.unpack_from("<HH", erofs, _SUPERBLOCK + 86)
    start = slot * 128
    if start + count * 128 > len(erofs):
        raise ArtifactError("metadata payload: device slots outside of the file")
    slots = (bytes(erofs[position : position + 64]) for position in range(start, start + count * 128, 128))
    return [tag.rstrip(b"\0").decode("ascii", "replace") for tag in slots]
