"""The images that this node knows: fetched, verified and recorded once, served from then on without their registry."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.payload import ALIGNMENT, Form
from loader.artifact import FOLLOWERS_ANNOTATION, START_ANNOTATION, Artifact
from loader.cache.claims import LEAST_AHEAD
from loader.cache.layout import Layout
from loader.cache.records import write_record
from loader.cache.state import ImageRecord, State
from loader.errors import BusyError, NotFoundError, RegistryError, UsageError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.find import find_artifact
from loader.registry.reference import LayoutReference, RegistryReference, RootfsReference, parse_reference
from loader.worker.counters import Counters
from loader.worker.objects import StoredMetadata, tags
from loader.worker.payloads import Payloads, payload_size, verified_payload
from loader.worker.sources import Sources
from loader.worker.starts import FOLLOWERS, START, Starts

log = logging.getLogger(__name__)

TRACE_PATIENCE = 1.0  # seconds


class Images:
    """Images by name and digest. Thread-safe."""

    def __init__(
        self, layout: Layout, state: State, sources: Sources, counters: Counters, starts: Starts,
        one_table: bool = False,
    ) -> None:  # fmt: skip
        """`one_table`: no two images may have different frame tables of a blob (cachefiles)."""
        self._layout = layout
        self._state = state
        self._sources = sources
        self._counters = counters
        self._starts = starts
        self._adding = threading.Lock()
        self._fetching: dict[tuple[str, str, Form], Future[ImageRecord]] = {}
        self._fetching_lock = threading.Lock()  # held for dictionary operations
        self._unpacking = threading.Lock()  # payloads that decompress to the limit take memory for one at a time
        self._hasher = ThreadPoolExecutor(1, "hash")
        self.payloads = Payloads(layout, state, counters, self._fetch_payload, one_table)
        self._tags: dict[str, tuple[Form, Digest]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the records again: which source holds which blob, and the tags of all blobs."""
        self._sources.clear()
        known: set[Digest] = set()
        for image in self._state.images():
            blobs = [blob for blob, _ in image.blobs]
            self._sources.add(repository(image.source), blobs)
            known.update(blobs)
        self._tags = tags(known)

    def find(self, text: str) -> ImageRecord:
        """A known image by name, digest or start of it; NotFoundError otherwise."""
        digest = self._state.find_id(text) or self._state.find_name(canonical(text))
        record = self._state.image(digest) if digest else None
        if record is None:
            raise NotFoundError(f"no image {text} is known here", hint="`erofs-loader list` shows those that are")
        return record

    def add(self, text: str, form: Form) -> ImageRecord:
        """Have an image's metadata of one form on this node.

        What an id or a digest names needs its registry only for what is missing here; a tag is looked up each time, but
        if that fails the image that it named last is taken.
        """
        by_id = self._state.find_id(text)
        reference = canonical(text) if by_id is None else ""
        digest = by_id or self._state.find_name(reference)
        known = self._state.image(digest) if digest else None
        here = known is not None and self.payloads.has(known.digest, form)
        if known and here and (by_id or pinned(reference)):
            return known
        try:
            if known and by_id:
                return self._fetch_once(known.source, known.name, form)
            return self._fetch_once(reference, reference, form)
        except RegistryError as error:
            if known and here:
                log.warning("%s: %s; using what is here, %s", text, error, known.digest)
                return known
            raise

    def _fetch_once(self, reference: str, name: str, form: Form) -> ImageRecord:
        """Fetch; who asks for the same meanwhile gets what is found: many starts of an image cost one lookup."""
        key, mine = (reference, name, form), Future[ImageRecord]()
        with self._fetching_lock:
            running = self._fetching.setdefault(key, mine)
        if running is not mine:
            return running.result()
        try:
            record = self._fetch(reference, name, form)
            mine.set_result(record)
            return record
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._fetching_lock:
                del self._fetching[key]

    def _fetch(self, reference: str, name: str, form: Form) -> ImageRecord:
        """A trace is asked for where it can say something: less than LEAST_AHEAD comes at once, whatever is read."""
        source = self._sources.open(repository(reference))
        descriptor, artifact = find_artifact(source, wanted(reference))
        size = sum(blob.size for blob in artifact.blobs)
        traced = [self._starts.look_for_trace(source, descriptor.digest)] if size > LEAST_AHEAD else []
        if not self.payloads.has(descriptor.digest, form):
            metadata, compressed = self._compressed(source, artifact, form, name)
            with self._unpacking:
                data, payload = verified_payload(compressed, metadata, artifact, form)
                hashing = self._hasher.submit(Digest.of, data)  # while it is written
                self.payloads.store(descriptor.digest, form, data, payload)
            self._starts.remember(descriptor.digest, START, artifact.annotations.get(START_ANNOTATION, ""))
            self._starts.remember(descriptor.digest, FOLLOWERS, artifact.annotations.get(FOLLOWERS_ANNOTATION, ""))
            sha256 = hashing.result()
            wait(traced, TRACE_PATIENCE)  # it was asked for while the metadata came
        else:
            sha256 = self._state.payloads(descriptor.digest)[form]
        record = ImageRecord(
            descriptor.digest,
            name,
            with_digest(reference, descriptor.digest),
            size,
            tuple((blob.digest, blob.size) for blob in artifact.blobs),
        )
        with self._adding:
            known = self._state.image(record.digest)
            self._state.add_image(record, form, sha256)
            write_record(self._layout, self._state, record.digest)
            if known is None or known.source == record.source:
                self._learn(record)
            else:
                self.reload()
        return record

    def _compressed(self, source: ImageSource, artifact: Artifact, form: Form, name: str) -> tuple[Descriptor, bytes]:
        """The metadata payload of an artifact as the registry has it."""
        metadata = artifact.metadata.get(form)
        if metadata is None:
            raise NotFoundError(f"{name}: the artifact has no metadata in the {form.value} form")
        if metadata.size > payload_size(metadata) + ALIGNMENT:
            raise ArtifactError(f"metadata descriptor: {metadata.size} bytes compressed are more than its content")
        compressed = source.blob(metadata)
        if metadata.data is None:
            self._counters.add("fetched_bytes", len(compressed))
        return metadata, compressed

    def _fetch_payload(self, record: ImageRecord, form: Form) -> bytes:
        """The payload of an image that is known already."""
        source = self._sources.open(repository(record.source))
        artifact = find_artifact(source, wanted(record.source))[1]
        metadata, compressed = self._compressed(source, artifact, form, record.name)
        with self._unpacking:
            return verified_payload(compressed, metadata, artifact, form)[0]

    def _learn(self, record: ImageRecord) -> None:
        """Where an image's blobs are, and their tags."""
        blobs = [blob for blob, _ in record.blobs]
        self._sources.add(repository(record.source), blobs)
        self._tags |= tags(set(blobs))

    def find_metadata(self, fsid: str) -> StoredMetadata | None:
        """cachefiles: the payload that a fsid names; several mounts of one image add `.N` to it."""
        hexadecimal, _, form_name = fsid.partition(".")[0].partition("-")
        try:
            image, form = Digest.parse(f"sha256:{hexadecimal}"), Form(form_name)
        except Exception:  # not one of ours, whatever it is
            return None
        path = self._layout.payload(image, form)
        return StoredMetadata(path, partial(self.payloads.read, image, form)) if path.exists() else None

    def find_tag(self, tag: str) -> tuple[Form, Digest] | None:
        """The blob and form that a device slot's tag names."""
        return self._tags.get(tag)

    def remove(self, record: ImageRecord) -> None:
        """Forget an image; its blobs go at the next collection. BusyError while it is mounted."""
        if mounted := [mount.target for mount in self._state.mounts() if mount.image == record.digest]:
            raise BusyError(f"{record.name} is mounted on {', '.join(mounted)}", hint="unmount it first")
        with self._adding:
            self._state.remove_image(record.digest)
            self.reload()
        shutil.rmtree(self._layout.payload(record.digest, Form.ENCODED).parent, ignore_errors=True)


# Names of images


def canonical(text: str) -> str:
    """An image's name in full; a layout's directory made absolute."""
    reference = parse_reference(text)
    if isinstance(reference, LayoutReference):
        return str(replace(reference, path=Path(os.path.abspath(reference.path))))  # noqa: PTH100 - no symlink is followed
    return str(reference)


def repository(text: str) -> str:
    """The place that an image is in, without tag and digest."""
    reference = parse_reference(text)
    if isinstance(reference, RegistryReference | LayoutReference):
        return str(replace(reference, tag=None, digest=None))
    return str(reference)


def with_digest(text: str, digest: Digest) -> str:
    """The same place, this manifest."""
    reference = parse_reference(text)
    if isinstance(reference, RegistryReference | LayoutReference):
        return str(replace(reference, tag=None, digest=digest))
    return str(reference)


def pinned(text: str) -> bool:
    """Whether a name always means the same manifest."""
    return getattr(parse_reference(text), "digest", None) is not None


def wanted(text: str) -> str:
    """What `ImageSource.resolve` takes for this reference."""
    reference = parse_reference(text)
    if isinstance(reference, RootfsReference):
        raise UsageError(f"{text}: a directory is not an image", hint="convert it first: erofs-builder convert")
    return reference.name
