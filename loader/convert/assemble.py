"""Layers → the artifact's documents: both forms' metadata, the content index, the manifest. Pure code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import zstandard

from erofs_builder.contents import Contents, encode_contents
from erofs_builder.digest import Digest
from erofs_builder.erofs.survey import Survey, devices
from erofs_builder.erofs.writer import write_image
from erofs_builder.frame_list import encode_frames
from erofs_builder.frames import FrameTable
from erofs_builder.hints import find_hints
from erofs_builder.hints_codec import encode_hints
from erofs_builder.layer import Layer
from erofs_builder.model import Blob, Node
from erofs_builder.payload import PAYLOAD_LEVEL, Form, complete_payload
from erofs_builder.startup_layout import Relaid
from erofs_builder.tree import flatten
from loader.artifact import (
    BLOB_TYPE,
    CONTENTS_TYPE,
    EMBEDDED_MAX,
    INODES_ANNOTATION,
    METADATA_TYPES,
    PAYLOAD_SIZE_ANNOTATION,
    START_ANNOTATION,
    Artifact,
)
from loader.convert.beside import Work, beside
from loader.registry.base import Descriptor

_COPIED_MAX = 200_000  # inodes: of more, the forms are made one after the other, to have all of it in memory once
_STEP = 1 << 20
_CONTENTS_LEVEL = 3  # most of it is digests, which do not compress at any level


@dataclass(frozen=True, slots=True)
class Assembled:
    """An artifact and the bytes of its small parts; `blobs` in device order, `inodes` of the flattened tree."""

    artifact: Artifact
    blobs: tuple[Blob, ...]
    documents: dict[Digest, bytes]
    inodes: int
    file_bytes: int


def assemble(
    layers: Sequence[Layer],
    subject: Descriptor | None,
    base_contents: Sequence[tuple[Blob, Contents]] = (),
    level: int = PAYLOAD_LEVEL,
    start_list: Callable[[Node, Sequence[Blob]], dict[str, str]] | None = None,
    rebuild: Callable[[Node], Relaid | None] | None = None,
    *,
    consume: bool = False,
) -> Assembled:
    """Flatten the layers and write everything but the data blobs. `start_list` says what a start reads, as annotations
    (start.py).

    `rebuild` moves what a traced start touches into a blob of its own (startup_layout.py); that is then the list.
    `consume` takes the layers apart on the way, a fifth of the memory: they cannot be used again.
    """
    inodes = sum(len(layer.entries) for layer in layers)  # or a few fewer
    root = flatten(layers, consume=consume)
    candidates = list(dict.fromkeys([blob for blob, _ in base_contents] + [la.blob for la in layers if la.blob]))
    relaid = rebuild(root) if rebuild else None
    if relaid:
        candidates.append(relaid.blob)
    copied = inodes <= _COPIED_MAX
    # A start's frames are looked for first, beside the survey: not those of a base, which come over a connection that a
    # copy of this process must not use.
    guess = partial(_start_text, root, candidates, relaid, start_list)
    with _beside(guess, copied and not base_contents) as start_text:
        survey = Survey(root, candidates)
        blobs = survey.blobs
        hints = encode_hints(find_hints(root, _tables(blobs)), _tables(blobs))
        with _beside(partial(_payload, survey, Form.DECODED, hints, level), copied) as decoded:
            encoded = _payload(survey, Form.ENCODED, hints, level)
            parts = {Form.ENCODED: encoded, Form.DECODED: decoded()}
        start: dict[str, str] = json.loads(start_text())
    contents = dict(base_contents) | {la.blob: la.contents for la in layers if la.blob}
    if relaid:
        contents[relaid.blob] = Contents()  # all of it is in the layers' blobs as well
    index = _compressed(encode_contents([(blob.digest, contents[blob]) for blob in blobs]), _CONTENTS_LEVEL)
    inodes, file_bytes = len(survey.tree.nodes), sum(node.size for node in survey.files)
    documents = {Digest.of(data): data for data in (*parts.values(), index)}
    artifact = Artifact(
        blobs=[_describe_blob(blob) for blob in blobs],
        metadata={form: _describe_payload(form, data) for form, data in parts.items()},
        contents=Descriptor(CONTENTS_TYPE, Digest.of(index), len(index)),
        subject=subject,
        annotations={INODES_ANNOTATION: str(inodes)} | {name: text for name, text in start.items() if text},
    )
    return Assembled(artifact, tuple(blobs), documents, inodes, file_bytes)


def _beside(work: Work, copied: bool) -> AbstractContextManager[Work]:
    return beside(work) if copied else nullcontext(work)


def _start_text(
    root: Node,
    candidates: list[Blob],
    relaid: Relaid | None,
    guess: Callable[[Node, Sequence[Blob]], dict[str, str]] | None,
) -> bytes:
    """The start's annotations, as JSON."""
    blobs = devices(root, candidates)
    start = guess(root, blobs) if guess and not relaid else {}
    if relaid:
        number = blobs.index(relaid.blob)
        start = {START_ANNOTATION: encode_frames((number, frame) for frame in range(relaid.start_frames))}
    return json.dumps(start).encode()


def _tables(blobs: Sequence[Blob]) -> list[FrameTable]:
    return [blob.table for blob in blobs if blob.table is not None]


def _payload(survey: Survey, form: Form, hints: bytes, level: int) -> bytes:
    """One form's payload as the registry has it."""
    payload, blobs = write_image(survey, form)
    complete_payload(form, payload, _tables(blobs), hints)
    return _compressed(payload, level)


def _compressed(data: bytes | bytearray, level: int) -> bytes:
    """One zstd stream; in steps, for a buffer for the worst case would be as large as the data."""
    stream = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj(size=len(data))
    view = memoryview(data)
    return b"".join([*(stream.compress(view[at : at + _STEP]) for at in range(0, len(view), _STEP)), stream.flush()])


def _describe_blob(blob: Blob) -> Descriptor:
    assert blob.table is not None
    return Descriptor(BLOB_TYPE, blob.digest, blob.table.blob_size)


def _describe_payload(form: Form, data: bytes) -> Descriptor:
    size = zstandard.frame_content_size(data)
    annotations = {PAYLOAD_SIZE_ANNOTATION: str(size)}
    embedded = data if len(data) <= EMBEDDED_MAX else None
    return Descriptor(METADATA_TYPES[form], Digest.of(data), len(data), annotations, data=embedded)
