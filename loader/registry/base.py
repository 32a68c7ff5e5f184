"""What every place that holds images can do: a registry, an `oci:` layout, an archive.

Contract, for all implementations:
- A short read is an error (TransientRegistryError), never a short result.
- Documents (manifests, configs) are checked against their digest before they are returned; `read_range` is not, since
  only its caller knows what the range must be: it verifies frames.
- NotFoundError: not there. TransientRegistryError: worth a retry. RegistryError: final. IntegrityError: wrong bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from erofs_builder.digest import Digest

# A blob that is read whole (configs, metadata, content indexes) has at most this many bytes.
SMALL_BLOB_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI descriptor: media type, digest and size, with the optional parts that we use."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = field(default_factory=dict)
    artifact_type: str | None = None
    platform: dict[str, Any] | None = None
    data: bytes | None = None  # the content itself, where the descriptor brings it along


class ImageSource(Protocol):
    """Where images are read from."""

    def resolve(self, reference: str) -> Descriptor:
        """The descriptor of a tag or digest in this repository (`reference`: "tag" or "sha256:…")."""
        ...

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest's or index's bytes, verified."""
        ...

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob's bytes, whole and verified (configs, metadata payloads)."""
        ...

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A stream of a large blob's bytes; the reader gets IntegrityError at its end if the digest does not match."""
        ...

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a blob at `offset`, unverified. Safe to call from many threads."""
        ...

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Manifests whose subject is `subject`: by the referrers API, else by the fallback tag. Exact type match."""
        ...

    def close(self) -> None:
        """Give back connections and files."""
        ...


class ImageTarget(ImageSource, Protocol):
    """Where images can be written to as well."""

    def tagged(self, tag: str) -> tuple[Descriptor, bytes] | None:
        """The manifest that a tag names now; None if there is none."""
        ...

    def has_blob(self, digest: Digest) -> bool:
        """Whether a blob is there already (and need not be uploaded)."""
        ...

    def put_blob(self, descriptor: Descriptor, chunks: Iterator[bytes]) -> None:
        """Upload a blob as a stream; the target checks the digest."""
        ...

    def put_manifest(self, media_type: str, data: bytes, tag: str | None) -> Descriptor:
        """Store a manifest, tagged or by digest; one with a `subject` becomes findable as a referrer (API or tag)."""
        ...
