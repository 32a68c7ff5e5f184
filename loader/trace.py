"""Traces: what a watched start read, stored beside the image's artifact for every other node.

artifactType  application/vnd.erofs-ondemand.trace.v1+json
config        application/vnd.oci.empty.v1+json ({})
layer         application/vnd.erofs-ondemand.trace.pages.v1+zstd: the pages (erofs_builder/page_trace.py), where they
              were recorded; else the empty descriptor
subject       the artifact whose blobs the trace speaks of
annotations   org.erofs-ondemand.trace: the frames in the order of their first use (erofs_builder/frame_list.py)
              org.opencontainers.image.created: when (RFC 3339, UTC); the newest one counts

A list of referrers carries its entries' annotations, so that a node has the trace with the list. A trace is a hint:
whoever can write one can make nodes fetch parts of the image that nobody needs, and no more.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, FormatError, IntegrityError
from erofs_builder.frame_list import decode_frames
from erofs_builder.page_trace import MAX_DOCUMENT, PageRun, decode_page_trace, encode_page_trace
from loader.artifact import EMPTY_CONFIG, MANIFEST_TYPE, descriptor_from_json, descriptor_to_json
from loader.convert.load import decompress
from loader.errors import LoaderError, NotFoundError
from loader.registry.base import Descriptor, ImageSource, ImageTarget
from loader.registry.config import RegistryConfig
from loader.registry.documents import parse_document, subject_of
from loader.registry.find import find_artifact
from loader.registry.open import open_image
from loader.registry.reference import is_path

TRACE_TYPE = "application/vnd.erofs-ondemand.trace.v1+json"
TRACE_ANNOTATION = "org.erofs-ondemand.trace"
CREATED_ANNOTATION = "org.opencontainers.image.created"
PAGES_TYPE = "application/vnd.erofs-ondemand.trace.pages.v1+zstd"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


def encode_trace(subject: Descriptor, frames: str, created: float, pages: Descriptor | None = None) -> bytes:
    """The manifest of a trace of the artifact `subject`, made at `created` (seconds since the epoch)."""
    empty = descriptor_to_json(Descriptor(_EMPTY_TYPE, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG)))
    bare = Descriptor(subject.media_type, subject.digest, subject.size)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": TRACE_TYPE,
        "config": empty,
        "layers": [descriptor_to_json(pages) if pages else empty],
        "subject": descriptor_to_json(bare),
        "annotations": {
            TRACE_ANNOTATION: frames,
            CREATED_ANNOTATION: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
        },
    }
    return json.dumps(document, indent=1).encode()


def publish_trace(
    target: ImageTarget, artifact: Digest, frames: str, created: float | None = None, pages: list[PageRun] | None = None
) -> Descriptor:
    """Store a trace beside its artifact, which must be there; it is of now unless `created` says otherwise."""
    subject = target.resolve(str(artifact))
    _put(target, Descriptor(_EMPTY_TYPE, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG)), EMPTY_CONFIG)
    layer = None
    if pages:
        data = zstandard.ZstdCompressor(level=19).compress(encode_page_trace(pages))
        layer = Descriptor(PAGES_TYPE, Digest.of(data), len(data))
        _put(target, layer, data)
    manifest = encode_trace(subject, frames, time.time() if created is None else created, layer)
    return target.put_manifest(MANIFEST_TYPE, manifest, None)


def _put(target: ImageTarget, descriptor: Descriptor, data: bytes) -> None:
    if not target.has_blob(descriptor.digest):
        target.put_blob(descriptor, iter((data,)))


def load_page_trace(text: str, config: RegistryConfig, platform: str | None = None) -> list[PageRun]:
    """The pages of a trace: of a file, or the newest recorded for the image or artifact that a reference names."""
    if is_path(text) and not Path(text).exists():
        raise NotFoundError(f"{text}: no such file")
    if is_path(text) or Path(text).is_file():
        return decode_page_trace(Path(text).read_bytes())
    source, name = open_image(text, config)
    try:
        descriptor, _ = find_artifact(source, name, platform)
        return find_pages(source, descriptor.digest)
    finally:
        source.close()


def find_pages(source: ImageSource, artifact: Digest) -> list[PageRun]:
    """The pages of an artifact's newest trace that has them; NotFoundError without one."""
    for referrer in _newest_first(source, artifact):
        try:
            document = parse_document(source.manifest(referrer), f"{source}@{referrer.digest}")
            layers = [descriptor_from_json(layer) for layer in document.get("layers") or ()]
            for layer in layers:
                if layer.media_type == PAGES_TYPE:
                    data = decompress(source.blob(layer), MAX_DOCUMENT, "trace", exact=False)
                    return decode_page_trace(data)
        except (ArtifactError, FormatError, IntegrityError, LoaderError):
            continue
    raise NotFoundError(
        f"{source}@{artifact}: no trace of pages refers to it", hint="record one: erofs-loader trace IMAGE -- COMMAND"
    )


def find_trace(source: ImageSource, artifact: Digest) -> str:
    """The newest usable trace of an artifact, empty without one; raises what the source does."""
    for referrer in _newest_first(source, artifact):
        try:
            frames = referrer.annotations.get(TRACE_ANNOTATION) or _read_trace(source, referrer, artifact)
            if decode_frames(frames):
                return frames
        except (ArtifactError, FormatError, IntegrityError, LoaderError):
            continue  # gone, or not what it says: another one may do
    return ""


def _newest_first(source: ImageSource, artifact: Digest) -> list[Descriptor]:
    found = source.referrers(artifact, TRACE_TYPE)
    return sorted(found, key=lambda each: each.annotations.get(CREATED_ANNOTATION, ""), reverse=True)


def _read_trace(source: ImageSource, referrer: Descriptor, artifact: Digest) -> str:
    """From the manifest, where the list of referrers has no annotations."""
    data = source.manifest(referrer)
    subject = subject_of(data)
    annotations = parse_document(data, f"{source}@{referrer.digest}").get("annotations")
    if subject is None or subject.digest != artifact or not isinstance(annotations, dict):
        raise ArtifactError(f"{source}@{referrer.digest}: no trace of {artifact}")
    return str(annotations.get(TRACE_ANNOTATION, ""))
