"""`--base`: what an earlier artifact's blobs hold, so that new blobs can leave it out."""

from __future__ import annotations

from dataclasses import dataclass

from erofs_builder.contents import Contents
from erofs_builder.model import Blob
from erofs_builder.payload import Form
from erofs_builder.pieces import Base, base_pieces
from loader.convert.load import load_contents, load_payload
from loader.registry.base import ImageSource
from loader.registry.find import find_artifact


@dataclass(frozen=True, slots=True)
class BaseArtifact:
    """An earlier artifact: where its blobs are, what they hold, and that by digest."""

    source: ImageSource
    blobs: tuple[tuple[Blob, Contents], ...]
    pieces: Base


def load_base(source: ImageSource, reference: str, platform: str | None) -> BaseArtifact:
    """The artifact that `reference` names or that belongs to the image it names."""
    _, artifact = find_artifact(source, reference, platform)
    form = Form.ENCODED if Form.ENCODED in artifact.metadata else Form.DECODED
    blobs = {table.blob_digest: Blob(table, from_base=True) for table in load_payload(source, artifact, form).tables}
    index = load_contents(source, artifact)
    known = tuple((blobs[digest], contents) for digest, contents in index if digest in blobs)
    return BaseArtifact(source, known, base_pieces(index, blobs))
