"""Traces: what a watched start read, stored beside the image's artifact for every other node.

artifactType  application/vnd.erofs-ondemand.trace.v1+json
config, layer application/vnd.oci.empty.v1+json ({})
subject       the artifact whose blobs the trace speaks of
annotations   org.erofs-ondemand.trace: the frames in the order of their first use (erofs_builder/frame_list.py)
              org.opencontainers.image.created: when (RFC 3339, UTC); the newest one counts

A list of referrers carries its entries' annotations, so that a node has the trace with the list. A trace is a hint:
whoever can write one can make nodes fetch parts of the image that nobody needs, and no more.
"""

from __future__ import annotations

import json
import time

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, FormatError, IntegrityError
from erofs_builder.frame_list import decode_frames
from loader.artifact import EMPTY_CONFIG, MANIFEST_TYPE, descriptor_to_json
from loader.errors import LoaderError
from loader.registry.base import Descriptor, ImageSource, ImageTarget
from loader.registry.documents import parse_document, subject_of

TRACE_TYPE = "application/vnd.erofs-ondemand.trace.v1+json"
TRACE_ANNOTATION = "org.erofs-ondemand.trace"
CREATED_ANNOTATION = "org.opencontainers.image.created"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


def encode_trace(subject: Descriptor, frames: str, created: float) -> bytes:
    """The manifest of a trace of the artifact `subject`, made at `created` (seconds since the epoch)."""
    empty = descriptor_to_json(Descriptor(_EMPTY_TYPE, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG)))
    bare = Descriptor(subject.media_type, subject.digest, subject.size)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": TRACE_TYPE,
        "config": empty,
        "layers": [empty],
        "subject": descriptor_to_json(bare),
        "annotations": {
            TRACE_ANNOTATION: frames,
            CREATED_ANNOTATION: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
        },
    }
    return json.dumps(document, indent=1).encode()


def publish_trace(target: ImageTarget, artifact: Digest, frames: str, created: float | None = None) -> Descriptor:
    """Store a trace beside its artifact, which must be there; it is of now unless `created` says otherwise."""
    subject = target.resolve(str(artifact))
    empty = Descriptor(_EMPTY_TYPE, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG))
    if not target.has_blob(empty.digest):
        target.put_blob(empty, iter((EMPTY_CONFIG,)))
    return target.put_manifest(
        MANIFEST_TYPE, encode_trace(subject, frames, time.time() if created is None else created), None
    )


def find_trace(source: ImageSource, artifact: Digest) -> str:
    """The newest usable trace of an artifact, empty without one; raises what the source does."""
    found = source.referrers(artifact, TRACE_TYPE)
    for referrer in sorted(found, key=lambda each: each.annotations.get(CREATED_ANNOTATION, ""), reverse=True):
        try:
            frames = referrer.annotations.get(TRACE_ANNOTATION) or _read_trace(source, referrer, artifact)
            if decode_frames(frames):
                return frames
        except (ArtifactError, FormatError, IntegrityError, LoaderError):
            continue  # gone, or not what it says: another one may do
    return ""


def _read_trace(source: ImageSource, referrer: Descriptor, artifact: Digest) -> str:
    """From the manifest, where the list of referrers has no annotations."""
    data = source.manifest(referrer)
    subject = subject_of(data)
    annotations = parse_document(data, f"{source}@{referrer.digest}").get("annotations")
    if subject is None or subject.digest != artifact or not isinstance(annotations, dict):
        raise ArtifactError(f"{source}@{referrer.digest}: no trace of {artifact}")
    return str(annotations.get(TRACE_ANNOTATION, ""))
