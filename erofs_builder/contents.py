"""Content index: which pieces of content a blob holds, so that later blobs can leave them out (docs/format.md).

For builders only; a node never fetches it. Decoded (in the registry it is one zstd stream), little-endian:

    0   magic        8  b"EROFSCI\\x01"
    8   version      2  1
    10  reserved     2
    12  blob_count   4
    then per blob:
        blob_digest 32
        piece_count  4
        frames       4 * piece_count   number of the frame that a piece lies in
        lengths      4 * piece_count   in bytes
        offsets      2 * piece_count   of the piece in the decoded frame, in 4 KiB blocks
        digests     32 * piece_count   sha256 of the piece
    crc32c           4  over everything before it

A piece is a whole small file, or one frame's worth of a larger one.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.frames import BLOCK, MAX_DECODED_BLOCKS
from erofs_builder.hot import crc32c

MAGIC = b"EROFSCI\x01"
VERSION = 1
MAX_SIZE = 1 << 32
_HEADER = struct.Struct("<8sHHI")
_BLOB = struct.Struct("<32sI")
_PIECE = 4 + 4 + 2 + 32


class Piece(NamedTuple):
    """One stored piece: where it lies in its blob."""

    digest: bytes
    frame: int
    offset: int  # in the decoded frame, bytes
    length: int


class Contents:
    """The pieces of one blob, in columns: a million of them is 42 MB, not a gigabyte of objects."""

    def __init__(self) -> None:
        self.frames = array("I")
        self.lengths = array("I")
        self.offsets = array("H")  # blocks
        self.digests = bytearray()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Piece:
        if not 0 <= index < len(self.frames):
            raise IndexError(index)
        return Piece(
            bytes(self.digests[32 * index : 32 * index + 32]),
            self.frames[index],
            self.offsets[index] * BLOCK,
            self.lengths[index],
        )

    def __iter__(self) -> Iterator[Piece]:
        offsets = (offset * BLOCK for offset in self.offsets)
        return map(Piece, self.each_digest(), self.frames, offsets, self.lengths)

    def each_digest(self) -> Iterator[bytes]:
        """The pieces' digests in order."""
        digests = bytes(self.digests)
        return (digests[at : at + 32] for at in range(0, len(digests), 32))

    def append(self, digest: bytes, frame: int, offset: int, length: int) -> None:
        """Note a piece; `offset` is a multiple of 4 KiB."""
        self.frames.append(frame)
        self.lengths.append(length)
        self.offsets.append(offset // BLOCK)
        self.digests += digest

    def extend(self, digests: bytearray, frames: array[int], offsets: array[int], lengths: array[int]) -> None:
        """Note several pieces, column by column; `digests` has 32 bytes a piece."""
        self.frames.extend(iter(frames))
        self.lengths.extend(lengths)
        self.offsets.extend(offset // BLOCK for offset in offsets)
        self.digests += digests


def encode_contents(blobs: Sequence[tuple[Digest, Contents]]) -> bytes:
    """The index of several blobs."""
    parts = [_HEADER.pack(MAGIC, VERSION, 0, len(blobs))]
    for digest, contents in blobs:
        parts.append(_BLOB.pack(digest.raw, len(contents)))
        parts += (_little(contents.frames), _little(contents.lengths), _little(contents.offsets))
        parts.append(bytes(contents.digests))
    body = b"".join(parts)
    return body + struct.pack("<I", crc32c(body))


def decode_contents(data: bytes) -> list[tuple[Digest, Contents]]:
    """Read an index; ArtifactError says what is wrong with it."""
    if len(data) < _HEADER.size + 4:
        raise ArtifactError(f"content index: {len(data)} bytes are too short for a header")
    magic, version, _, blob_count = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ArtifactError(f"content index: unknown magic {magic!r} or version {version}")
    end = len(data) - 4
    if struct.unpack_from("<I", data, end)[0] != crc32c(memoryview(data)[:end]):
        raise ArtifactError("content index: checksum mismatch")
    blobs: list[tuple[Digest, Contents]] = []
    at = _HEADER.size
    for _ in range(blob_count):
        if end - at < _BLOB.size:
            raise ArtifactError("content index: fewer blobs than its header says")
        digest, count = _BLOB.unpack_from(data, at)
        at += _BLOB.size
        if count * _PIECE > end - at:
            raise ArtifactError("content index: a blob's pieces are cut off")
        blobs.append((Digest(digest), _decode_blob(data, at, count)))
        at += count * _PIECE
    if at != end:
        raise ArtifactError("content index: bytes behind the last blob")
    return blobs


def _decode_blob(data: bytes, at: int, count: int) -> Contents:
    contents = Contents()
    for column in (contents.frames, contents.lengths, contents.offsets):
        size = column.itemsize * count
        column.frombytes(data[at : at + size])
        if sys.byteorder == "big":
            column.byteswap()
        at += size
    contents.digests += data[at : at + 32 * count]
    for offset, length in zip(contents.offsets, contents.lengths, strict=True):
        if not 1 <= length <= (MAX_DECODED_BLOCKS - offset) * BLOCK:
            raise ArtifactError(f"content index: a piece of {length} bytes at block {offset} of its frame")
    return contents


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()
