"""R7, another way: what an update would take on the wire if a node that has the old image rebuilt new frames from it.

A delta is a new frame's content compressed with the old versions of its files as dictionary. A node that has those
frames decodes it, compresses the content as the builder did, and gets the frame, which its digest proves. Nothing in
the format or the daemon does this yet: this measures what it would bring and cost.
"""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import zstandard

from erofs_builder.blob import new_compressor, padding_for
from erofs_builder.digest import Digest
from erofs_builder.layer import Layer, Options, build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.pieces import base_pieces
from erofs_builder.tree import flatten, walk
from tests.images.layout import Layout

_AROUND = 256 << 10  # bytes of an old file before and behind the place where the new one has the frame
_MAX_DICTIONARY = 4 << 20


class Deltas(NamedTuple):
    """Sums over the frames that an update adds."""

    frames: int
    plain: int  # bytes of the frames as the blob has them
    deltas: int  # bytes of the smaller of frame and delta
    rebuild: float  # seconds to rebuild them all, one core
    rebuilt: int  # how many had the digest that they should have


class _Part(NamedTuple):
    """A part of a file that lies in a frame."""

    path: bytes
    at: int  # in the file
    length: int


def measure(old: Path, new: Path, level: int, options: Options) -> Deltas:
    """Build the old image's layers, the new one's over them, and a delta for each new frame."""
    before = _build(old, Options())
    blobs = {layer.blob.digest: layer.blob for layer, _ in before if layer.blob}
    base = base_pieces(((layer.blob.digest, layer.contents) for layer, _ in before if layer.blob), blobs)
    after = _build(new, options, base)
    held = set(blobs.values())
    data = {layer.blob: encoded for layer, encoded in (*before, *after) if layer.blob}
    old_files = dict(walk(flatten([layer for layer, _ in before])))
    parts = _parts(flatten([layer for layer, _ in after]), held)
    return _sum(parts, data, old_files, level, options)


def _build(layout: Path, options: Options, base: object = None) -> list[tuple[Layer, bytes]]:
    place = Layout(layout)
    built = []
    for descriptor in place.manifest("latest")["layers"]:
        out = io.BytesIO()
        with open(place.blob_path(descriptor["digest"]), "rb") as tar:
            layer = build_layer(tar, out, base=base, options=options)  # type: ignore[arg-type]
        built.append((layer, out.getvalue()))
    return built


def _parts(root: Node, held: set[Blob]) -> dict[tuple[Blob, int], list[_Part]]:
    """What lies in each frame that the old image does not have."""
    found: dict[tuple[Blob, int], list[_Part]] = defaultdict(list)
    for path, node in walk(root):
        at = 0
        for extent in node.extents:
            if extent.blob is not None and extent.blob not in held:
                found[extent.blob, extent.frame].append(_Part(path, at, extent.length))
            at += extent.length
    return found


def _sum(
    parts: Mapping[tuple[Blob, int], list[_Part]],
    data: Mapping[Blob, bytes],
    old_files: Mapping[bytes, Node],
    level: int,
    options: Options,
) -> Deltas:
    settings = [new_compressor(options.level, prose=prose) for prose in (False, True)]  # a delta would say which
    plain = deltas = rebuilt = 0
    seconds = 0.0
    for (blob, number), inside in parts.items():
        assert blob.table is not None
        frame = blob.table[number]
        encoded = data[blob][frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        content = zstandard.decompress(encoded)
        dictionary = b"".join(_old_bytes(inside, old_files, data))[:_MAX_DICTIONARY]
        plain += len(encoded)
        if not dictionary:
            deltas += len(encoded)
            rebuilt += 1
            continue
        known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        delta = zstandard.ZstdCompressor(level=level, dict_data=known).compress(content)
        deltas += min(len(delta), len(encoded))
        begin = time.process_time()
        plain_again = zstandard.ZstdDecompressor(dict_data=known).decompress(delta)
        rebuilt += any(_frame_digest(setting.compress(plain_again)) == frame.digest for setting in settings)
        seconds += time.process_time() - begin
    return Deltas(len(parts), plain, deltas, seconds, rebuilt)


def _frame_digest(encoded: bytes) -> bytes:
    return Digest.of(encoded + padding_for(len(encoded))).raw


def _old_bytes(inside: list[_Part], old_files: Mapping[bytes, Node], data: Mapping[Blob, bytes]) -> Iterator[bytes]:
    for part in inside:
        node = old_files.get(part.path)
        if node is not None and node.extents:
            yield _read(node, max(part.at - _AROUND, 0), part.at + part.length + _AROUND, data)


def _read(node: Node, start: int, end: int, data: Mapping[Blob, bytes]) -> bytes:
    pieces, at = [], 0
    for extent in node.extents:
        low, high = max(start, at), min(end, at + extent.length)
        if low < high and extent.blob is not None and extent.blob.table is not None:
            frame = extent.blob.table[extent.frame]
            encoded = data[extent.blob][frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
            content = zstandard.decompress(encoded)
            pieces.append(content[extent.frame_offset + low - at : extent.frame_offset + high - at])
        at += extent.length
    return b"".join(pieces)
