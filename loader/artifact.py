"""The artifact: the OCI 1.1 manifest that ties data blobs, metadata payloads and the source image together.

artifactType  application/vnd.erofs-ondemand.image.v1+json
config        application/vnd.oci.empty.v1+json ({})
subject       the source image's manifest, untouched
layers        the data blobs in the order of the device slots, then the content index (for builders), then one
              metadata payload per form
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, FormatError
from erofs_builder.payload import Form
from loader.registry.base import Descriptor

ARTIFACT_TYPE = "application/vnd.erofs-ondemand.image.v1+json"
BLOB_TYPE = "application/vnd.erofs-ondemand.blob.v1+zstd"
CONTENTS_TYPE = "application/vnd.erofs-ondemand.contents.v1+zstd"
METADATA_TYPES = {
    Form.ENCODED: "application/vnd.erofs-ondemand.metadata.encoded.v1+zstd",
    Form.DECODED: "application/vnd.erofs-ondemand.metadata.decoded.v1+zstd",
}
_SINGLE = {CONTENTS_TYPE, *METADATA_TYPES.values()}
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_CONFIG = b"{}"
# The payload's size once decompressed: a node refuses a stream that gives more.
PAYLOAD_SIZE_ANNOTATION = "org.erofs-ondemand.payload-size"
EMBEDDED_MAX = 8192  # bytes of a payload that the manifest brings along: less than a round trip costs
MAX_BLOB_SIZE = 1 << 63  # what sizes are kept in, here and in the Go of registries
INODES_ANNOTATION = "org.erofs-ondemand.inodes"
# What the image's start reads, as its builder knows it (erofs_builder/frame_list.py).
START_ANNOTATION = "org.erofs-ondemand.start"
# What is read once a plug-in is (erofs_builder/followers.py).
FOLLOWERS_ANNOTATION = "org.erofs-ondemand.followers"
# Counts the artifacts that one subject got one after the other; the first has none. The highest is the newest.
GENERATION_ANNOTATION = "org.erofs-ondemand.generation"


@dataclass(slots=True)
class Artifact:
    """What an artifact's manifest says."""

    blobs: list[Descriptor]
    metadata: dict[Form, Descriptor]
    contents: Descriptor | None = None
    subject: Descriptor | None = None
    annotations: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The manifest's bytes; the same artifact gives the same bytes."""
        layers = [*self.blobs, *([self.contents] if self.contents else [])]
        layers += [self.metadata[form] for form in Form if form in self.metadata]
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {
                "mediaType": "application/vnd.oci.empty.v1+json",
                "digest": str(Digest.of(EMPTY_CONFIG)),
                "size": len(EMPTY_CONFIG),
            },
            "layers": [descriptor_to_json(layer) for layer in layers],
        }
        if self.subject:
            document["subject"] = descriptor_to_json(self.subject)
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        return json.dumps(document, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Artifact:
        """Read a manifest; ArtifactError says why it is not an artifact of ours."""
        try:
            document = json.loads(data)
            if document.get("artifactType") != ARTIFACT_TYPE:
                raise ArtifactError(f"not an erofs-ondemand artifact: artifactType {document.get('artifactType')!r}")
            layers = [descriptor_from_json(layer) for layer in document["layers"]]
            single = [each.media_type for each in layers if each.media_type in _SINGLE]
            if len(single) != len(set(single)):
                raise ArtifactError("malformed artifact manifest: two content indexes, or two payloads of one form")
            subject = document.get("subject")
            return cls(
                blobs=[layer for layer in layers if layer.media_type == BLOB_TYPE],
                metadata={
                    form: layer for form, name in METADATA_TYPES.items() for layer in layers if layer.media_type == name
                },
                contents=next((layer for layer in layers if layer.media_type == CONTENTS_TYPE), None),
                subject=descriptor_from_json(subject) if subject else None,
                annotations=_annotations(document),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"malformed artifact manifest: {error!r}") from None


def _annotations(document: Any) -> dict[str, str]:
    """The annotations of a document; TypeError unless they are strings by name."""
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise TypeError("annotations must be strings")
    return dict(annotations)


def descriptor_to_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as OCI writes it."""
    document: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.artifact_type:
        document["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        document["annotations"] = dict(sorted(descriptor.annotations.items()))
    if descriptor.platform:
        document["platform"] = descriptor.platform
    if descriptor.data is not None:
        document["data"] = base64.b64encode(descriptor.data).decode()
    return document


def descriptor_from_json(document: Any) -> Descriptor:
    """A descriptor of a manifest; ArtifactError if it is malformed."""
    try:
        size, platform, artifact_type = (document.get(name) for name in ("size", "platform", "artifactType"))
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < MAX_BLOB_SIZE:
            raise ArtifactError(f"malformed descriptor: size {size!r}")
        if not isinstance(platform, dict | None) or not isinstance(artifact_type, str | None):
            raise ArtifactError("malformed descriptor: its platform is not an object or its artifactType not a string")
        digest = Digest.parse(document["digest"])
        return Descriptor(
            media_type=str(document["mediaType"]),
            digest=digest,
            size=size,
            annotations=_annotations(document),
            artifact_type=artifact_type,
            platform=platform,
            data=_embedded(document.get("data"), digest, size),
        )
    except FormatError as error:
        raise ArtifactError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"malformed descriptor: {error!r}") from None


def _embedded(text: Any, digest: Digest, size: int) -> bytes | None:
    """The content that a descriptor brings along; None if there is none, or it is not what the descriptor speaks of."""
    if not isinstance(text, str) or size > EMBEDDED_MAX:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if len(data) == size and Digest.of(data) == digest else None
