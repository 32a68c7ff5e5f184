"""OCI image layouts on disk, read and written.

DIR/oci-layout          {"imageLayoutVersion": "1.0.0"}
DIR/index.json          the manifests; tags are annotations; artifacts stand there without a tag
DIR/blobs/sha256/HEX    every blob and manifest
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, IntegrityError
from loader.artifact import INDEX_TYPE, descriptor_to_json
from loader.errors import LoaderError, NotFoundError, TransientRegistryError, UsageError
from loader.registry.base import Descriptor
from loader.registry.documents import (
    MANIFEST_LIMIT,
    as_referrer,
    describe_manifest,
    fallback_tag,
    index_entries,
    subject_of,
)
from loader.registry.streams import verified_stream

TAG_ANNOTATION = "org.opencontainers.image.ref.name"
_MAX_OPEN = 256  # blobs kept open for read_range
_LARGEST_OFFSET = (1 << 63) - 1


class Layout:
    """An `oci:` directory as ImageSource and ImageTarget. Thread-safe; several processes may write to one."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = path
        self._files: dict[Digest, int] = {}
        self._lock = threading.Lock()
        if create:
            self._create()
        elif not (path / "oci-layout").is_file():
            raise NotFoundError(f"oci:{path}: not an OCI image layout", "expected a directory with an oci-layout file")

    def __str__(self) -> str:
        return f"oci:{self.path}"

    # ImageSource

    def resolve(self, reference: str) -> Descriptor:
        """A tag's or digest's descriptor; an empty reference is the only image of the layout."""
        return resolve_in_index(self._entries(), reference, str(self), self._by_digest)

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest's or index's bytes, verified."""
        return self.blob(descriptor)

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob's bytes, whole and verified."""
        path = self._blob_path(descriptor.digest)
        size = self._size_of(path)
        if size != descriptor.size:
            raise IntegrityError(f"{path}: {size} bytes, its descriptor says {descriptor.size}")
        data = path.read_bytes()
        descriptor.digest.verify(data, str(path))
        return data

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A verified stream of a blob."""
        path = self._blob_path(descriptor.digest)
        self._size_of(path)
        return verified_stream(path.open("rb", buffering=0), descriptor.digest, descriptor.size, str(path))

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a blob at `offset`, unverified."""
        with self._opened(digest) as handle:
            data = pread_whole(handle, length, offset)
        if len(data) != length:
            raise TransientRegistryError(f"{self}@{digest}: {len(data)} of {length} bytes at {offset}")
        return data

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Manifests of the layout with this subject: those in the index, and those under the fallback tag."""
        found: dict[Digest, Descriptor] = {}
        for entry in self._entries():
            if entry.annotations.get(TAG_ANNOTATION) == fallback_tag(subject) and entry.media_type == INDEX_TYPE:
                found |= {item.digest: item for item in index_entries(self.blob(entry), str(self))}
            elif entry.size <= MANIFEST_LIMIT:
                data = self.blob(entry)
                named = subject_of(data)
                if named is not None and named.digest == subject:
                    found[entry.digest] = as_referrer(replace(entry, platform=None), data)
        return [entry for entry in found.values() if entry.artifact_type == artifact_type]

    def close(self) -> None:
        """Give back the files."""
        with self._lock:
            files, self._files = list(self._files.values()), {}
        for file in files:
            os.close(file)

    # ImageTarget

    def tagged(self, tag: str) -> tuple[Descriptor, bytes] | None:
        """The manifest that a tag names; None also if the layout lacks it."""
        try:
            descriptor = self.resolve(tag)
            return descriptor, self.manifest(descriptor)
        except NotFoundError:
            return None

    def has_blob(self, digest: Digest) -> bool:
        """Whether a blob is there. One that a power cut left empty is not."""
        try:
            return self._blob_path(digest).stat().st_size > 0 or digest == Digest.of(b"")
        except OSError:
            return False

    def put_blob(self, descriptor: Descriptor, chunks: Iterator[bytes]) -> None:
        """Store a blob; it appears whole and checked, or not at all."""
        path = self._blob_path(descriptor.digest)
        checksum, size = hashlib.sha256(), 0
        with _atomic(path) as file:
            for chunk in chunks:
                checksum.update(chunk)
                size += len(chunk)
                file.write(chunk)
            if Digest(checksum.digest()) != descriptor.digest or size != descriptor.size:
                raise IntegrityError(f"{path}: what was written is not the blob of the descriptor")

    def adopt_blob(self, digest: Digest, file: Path) -> None:
        """Take a finished file over as a blob; it must be on the same file system and have this digest."""
        file.chmod(0o644)
        file.rename(self._blob_path(digest))

    def put_manifest(self, media_type: str, data: bytes, tag: str | None) -> Descriptor:
        """Store a manifest and list it in the index, tagged or not."""
        described = describe_manifest(data, f"{self}: manifest", media_type)
        if not self.has_blob(described.digest):
            self.put_blob(described, iter((data,)))
        entry = replace(described, annotations={TAG_ANNOTATION: tag} if tag else {})
        with self._index_lock():
            document = self._document()
            manifests = [
                item
                for item in document["manifests"]
                if not (tag and (item.get("annotations") or {}).get(TAG_ANNOTATION) == tag)
                and not (item.get("digest") == str(entry.digest) and not (item.get("annotations") or {}))
            ]
            if tag or not any(item.get("digest") == str(entry.digest) for item in manifests):
                manifests.append(descriptor_to_json(entry))
            document["manifests"] = sorted(manifests, key=_index_order)
            with _atomic(self.path / "index.json") as file:
                file.write(json.dumps(document, indent=1).encode())
        return described

    # Files

    def _create(self) -> None:
        try:
            (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
            if not (self.path / "oci-layout").exists():
                with _atomic(self.path / "oci-layout") as file:
                    file.write(b'{"imageLayoutVersion":"1.0.0"}')
            with self._index_lock():
                if not (self.path / "index.json").exists():
                    with _atomic(self.path / "index.json") as file:
                        file.write(json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}).encode())
        except OSError as error:
            raise LoaderError(f"{self}: cannot create the layout: {error.strerror}") from None

    @contextmanager
    def _index_lock(self) -> Iterator[None]:
        # the directory itself: no lock file is left in a layout that other programs read
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _document(self) -> dict[str, Any]:
        path = self.path / "index.json"
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"{self}: no index.json") from None
        except (ValueError, RecursionError):
            raise ArtifactError(f"{path}: not JSON") from None
        manifests = document.get("manifests") if isinstance(document, dict) else None
        if not isinstance(manifests, list) or not all(isinstance(entry, dict) for entry in manifests):
            raise ArtifactError(f"{path}: not an OCI index")
        return dict(document)

    def _entries(self) -> list[Descriptor]:
        self._document()  # says what is wrong with it
        return index_entries((self.path / "index.json").read_bytes(), f"{self.path}/index.json")

    def _by_digest(self, digest: Digest) -> Descriptor:
        path = self._blob_path(digest)
        if self._size_of(path) > MANIFEST_LIMIT:
            raise ArtifactError(f"{path}: too large for a manifest")
        data = path.read_bytes()
        digest.verify(data, str(path))
        return describe_manifest(data, str(path))

    def _blob_path(self, digest: Digest) -> Path:
        return self.path / "blobs/sha256" / digest.hex

    def _size_of(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            raise NotFoundError(f"{path}: no such blob", "the layout may be incomplete: copy it again") from None

    @contextmanager
    def _opened(self, digest: Digest) -> Iterator[int]:
        """A blob's file descriptor. The first ones stay open until `close`; nothing is closed under another reader."""
        handle = self._files.get(digest)
        if handle is not None:
            yield handle
            return
        try:
            handle = os.open(self._blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"{self}@{digest}: no such blob") from None
        except OSError as error:
            raise TransientRegistryError(f"{self}@{digest}: {error.strerror}") from None
        with self._lock:
            kept = digest not in self._files and len(self._files) < _MAX_OPEN
            if kept:
                self._files[digest] = handle
        try:
            yield handle
        finally:
            if not kept:
                os.close(handle)


def pread_whole(handle: int, length: int, offset: int) -> bytes:
    """`length` bytes of a file at `offset`, fewer only where the file ends."""
    if offset > _LARGEST_OFFSET:  # a header may say so
        return b""
    data = os.pread(handle, length, offset)
    while len(data) < length:
        more = os.pread(handle, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def resolve_in_index(
    entries: list[Descriptor],
    reference: str,
    what: str,
    by_digest: Callable[[Digest], Descriptor] | None = None,
) -> Descriptor:
    """Find a tag, a digest, or (empty reference) the only image of an index.json."""
    if reference.startswith("sha256:"):
        digest = Digest.parse(reference)
        listed = next((entry for entry in entries if entry.digest == digest), None)
        if listed is not None:
            return listed
        if by_digest is not None:
            return by_digest(digest)
        raise NotFoundError(f"{what}@{reference}: not in the index")
    tags = {entry.annotations.get(TAG_ANNOTATION): entry for entry in entries}
    if reference:
        if reference not in tags:
            there = ", ".join(sorted(tag for tag in tags if tag))
            raise NotFoundError(f"{what}:{reference}: no such tag", f"there are: {there}" if there else None)
        return tags[reference]
    images = {entry.digest: entry for entry in entries if entry.artifact_type is None} or {
        entry.digest: entry for entry in entries
    }
    if len(images) != 1:
        there = ", ".join(sorted(tag for tag in tags if tag))
        raise UsageError(f"{what}: holds {len(images)} images", f"name one of: {there}" if there else None)
    return next(iter(images.values()))


def _index_order(entry: dict[str, object]) -> tuple[str, str]:
    annotations = entry.get("annotations")
    tag = annotations.get(TAG_ANNOTATION, "") if isinstance(annotations, dict) else ""
    return str(tag), str(entry.get("digest"))


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place only once it is whole.

    Not synced: every blob is checked when it is read, and one flush would wait for all the blobs just written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
