"""Put an artifact into a target: what is there stays, what another repository has is linked, the rest goes up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from erofs_builder.digest import Digest
from loader.artifact import ARTIFACT_TYPE, EMPTY_CONFIG, GENERATION_ANNOTATION, MANIFEST_TYPE, Artifact
from loader.convert.assemble import Assembled
from loader.convert.progress import Progress, Task
from loader.errors import LoaderError
from loader.registry.base import Descriptor, ImageSource, ImageTarget
from loader.registry.find import generation_of, newest_first
from loader.registry.patience import patiently
from loader.registry.streams import CHUNK

_PARALLEL = 3  # uploads at a time: hides a distant registry's round trips


@runtime_checkable
class Adopting(Protocol):
    """A target on this machine that takes a finished file over without a copy."""

    def adopt_blob(self, digest: Digest, file: Path) -> None: ...


@runtime_checkable
class Linking(Protocol):
    """A registry's repository, which can take over blobs of another one beside it."""

    @property
    def host(self) -> str: ...

    @property
    def repository(self) -> str: ...

    def mount_blob(self, digest: Digest, from_repository: str) -> bool: ...


@dataclass(slots=True)
class Published:
    """What came of it."""

    descriptor: Descriptor
    uploaded: dict[Digest, str] = field(default_factory=dict)  # "uploaded", "there", "linked", "copied"


def publish(
    assembled: Assembled,
    files: dict[Digest, Path],
    base: ImageSource | None,
    target: ImageTarget,
    tag: str | None,
    progress: Progress,
) -> Published:
    """Blobs first, several at a time, then the small parts, the manifest last: nobody finds half an artifact."""
    artifact = assembled.artifact
    how: dict[Digest, str] = {}
    with ThreadPoolExecutor(_PARALLEL) as pool:
        there = pool.map(lambda blob: patiently(lambda: target.has_blob(blob.digest)), artifact.blobs)
        missing = [blob for blob, found in zip(artifact.blobs, there, strict=True) if not found]
        how = {blob.digest: "there" for blob in artifact.blobs}
        if missing:
            with progress.task(f"publish {len(missing)} blobs", sum(blob.size for blob in missing)) as task:
                put = pool.map(lambda blob: _put_data(blob, files.get(blob.digest), base, target, task), missing)
                how |= {blob.digest: done for blob, done in zip(missing, put, strict=True)}
    small = {**assembled.documents, Digest.of(EMPTY_CONFIG): EMPTY_CONFIG}
    for digest, data in small.items():
        descriptor = Descriptor("application/octet-stream", digest, len(data))
        how[digest] = _put_bytes(descriptor, data, target)
    manifest = as_newest(target, artifact.subject, lambda annotations: _manifest(artifact, annotations))
    return Published(patiently(lambda: target.put_manifest(MANIFEST_TYPE, manifest, tag)), how)


def _manifest(artifact: Artifact, annotations: dict[str, str]) -> bytes:
    return replace(artifact, annotations=artifact.annotations | annotations).encode()


def as_newest(target: ImageTarget, subject: Descriptor | None, encode: Callable[[dict[str, str]], bytes]) -> bytes:
    """The document that whoever looks for the subject's artifact finds: of a generation above what is there.

    What was published last, published again, is the same document. `encode` makes it with these annotations.
    """
    known = newest_first(target.referrers(subject.digest, ARTIFACT_TYPE)) if subject else []
    if not known:
        return encode({})
    newest = generation_of(known[0])
    again = encode(_generation(newest))
    return again if Digest.of(again) == known[0].digest else encode(_generation(newest + 1))


def _generation(number: int) -> dict[str, str]:
    return {GENERATION_ANNOTATION: str(number)} if number else {}


def _put_data(blob: Descriptor, file: Path | None, base: ImageSource | None, target: ImageTarget, task: Task) -> str:
    if file is None:
        return _put_base_blob(blob, base, target, task)
    if isinstance(target, Adopting):
        target.adopt_blob(blob.digest, file)
        task.advance(blob.size)
        return "uploaded"
    patiently(lambda: target.put_blob(blob, _file_chunks(file, task.advance)))
    return "uploaded"


def _put_base_blob(blob: Descriptor, base: ImageSource | None, target: ImageTarget, task: Task) -> str:
    """A blob of the base's repository: linked inside of one registry, else copied."""
    if base is None:
        raise LoaderError(f"blob {blob.digest} is neither at hand nor in the target")
    if isinstance(base, Linking) and isinstance(target, Linking) and _link(base, target, blob):
        task.advance(blob.size)
        return "linked"

    def copy() -> None:
        with base.open_blob(blob) as stream:
            target.put_blob(blob, _stream_chunks(stream.read, task.advance))

    patiently(copy)
    return "copied"


def _link(base: Linking, target: Linking, blob: Descriptor) -> bool:
    return base.host == target.host and patiently(lambda: target.mount_blob(blob.digest, base.repository))


def _put_bytes(descriptor: Descriptor, data: bytes, target: ImageTarget) -> str:
    if patiently(lambda: target.has_blob(descriptor.digest)):
        return "there"
    patiently(lambda: target.put_blob(descriptor, iter((data,))))
    return "uploaded"


def _file_chunks(file: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as stream:
        with suppress(OSError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield from _stream_chunks(stream.read, advance)


def _stream_chunks(read: Callable[[int], bytes | None], advance: Callable[[int], None]) -> Iterator[bytes]:
    while data := read(CHUNK):
        yield data
        advance(len(data))
