"""Read an artifact's small parts back: payloads and content index, verified and bounded."""

from __future__ import annotations

import io

import zstandard

from erofs_builder.contents import MAX_SIZE as MAX_CONTENTS
from erofs_builder.contents import Contents, decode_contents
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.payload import Form, Payload, decode_payload
from loader.artifact import PAYLOAD_SIZE_ANNOTATION, Artifact
from loader.errors import NotFoundError
from loader.registry.base import Descriptor, ImageSource

MAX_PAYLOAD = 1 << 32  # bytes decompressed: a few million inodes
_WINDOW = 1 << 27
_STEP = 1 << 20
_CONTENTS_FREE, _CONTENTS_RATIO = 1 << 20, 16


def load_payload(source: ImageSource, artifact: Artifact, form: Form) -> Payload:
    """One form's metadata and frame tables, checked against the artifact's blobs."""
    descriptor = artifact.metadata.get(form)
    if descriptor is None:
        raise NotFoundError(f"{source}: the artifact has no metadata of the {form.value} form")
    size = _payload_size(descriptor)
    payload = decode_payload(decompress(source.blob(descriptor), size, f"{form.value} metadata"))
    if payload.form is not form:
        raise ArtifactError(f"{form.value} metadata: says that it is of the {payload.form.value} form")
    listed = [(blob.digest, blob.size) for blob in artifact.blobs]
    if [(table.blob_digest, table.blob_size) for table in payload.tables] != listed:
        raise ArtifactError(f"{form.value} metadata: its frame tables are not those of the artifact's blobs")
    return payload


def load_contents(source: ImageSource, artifact: Artifact) -> list[tuple[Digest, Contents]]:
    """The content index: what each of the artifact's blobs holds. Not checked against their frame tables."""
    if artifact.contents is None:
        raise NotFoundError(f"{source}: the artifact has no content index")
    compressed = source.blob(artifact.contents)
    # Most of an index is digests, which do not compress: more than this is no index, but an attempt on our memory.
    limit = min(MAX_CONTENTS, _CONTENTS_FREE + _CONTENTS_RATIO * len(compressed))
    data = decompress(compressed, limit, "content index", exact=False)
    index = decode_contents(data)
    lacking = {blob.digest for blob in artifact.blobs} - {digest for digest, _ in index}
    if lacking:
        raise ArtifactError(f"content index: says nothing of blob {min(lacking)}")
    return index


def _payload_size(descriptor: Descriptor) -> int:
    text = descriptor.annotations.get(PAYLOAD_SIZE_ANNOTATION, "")
    if not text.isdecimal() or len(text) > 12 or int(text) > MAX_PAYLOAD:
        raise ArtifactError(f"metadata {descriptor.digest}: annotation {PAYLOAD_SIZE_ANNOTATION} is {text[:40]!r}")
    return int(text)


def decompress(data: bytes, size: int, what: str, *, exact: bool = True) -> bytes:
    """A zstd stream's content: exactly `size` bytes, or at most that. Takes no more memory than there is content."""
    plain = bytearray()
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        if exact and zstandard.frame_content_size(data) == size:  # as it says itself: memory is taken as it is filled
            return decompressor.decompress(data)
        reader = decompressor.stream_reader(io.BytesIO(data))
        while (part := reader.read(_STEP)) and len(plain) <= size:
            plain += part
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{what}: {error}") from None
    if len(plain) > size or (exact and len(plain) != size):
        raise ArtifactError(f"{what}: not the {size} bytes that it should decompress to")
    return bytes(plain)
