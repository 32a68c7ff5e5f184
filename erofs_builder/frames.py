"""Frame table: where each frame of a data blob lies, how large it is decoded, and its digest.

A *frame* is the unit that is compressed, fetched and verified: one zstd frame with content checksum and known content
size, followed by a skippable frame up to the next 4 KiB. On disk (docs/format.md; all integers little-endian):

    0   magic          8  b"EROFSFT\\x01"
    8   version        2  1
    10  digest_length  2  32
    12  frame_count    4
    16  blob_size      8  bytes of the blob as the registry holds it
    24  decoded_size   8  bytes that `zstd -d` of the blob gives
    32  blob_digest   32  sha256 of the blob
    64  encoded blocks 2 * frame_count   4 KiB blocks that a frame takes in the blob
        decoded blocks 2 * frame_count   4 KiB blocks that it decodes to
        digests       32 * frame_count   sha256 of the frame's encoded blocks, padding included
        crc32c         4  over everything before it (standard Castagnoli)
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from erofs_builder.digest import Digest
from erofs_builder.errors import FrameTableError
from erofs_builder.hot import crc32c

BLOCK = 4096
MAGIC = b"EROFSFT\x01"
VERSION = 1
DIGEST_LENGTH = 32
MAX_ENCODED_BLOCKS = 256  # 1 MiB: the largest physical cluster that the kernel takes
MAX_DECODED_BLOCKS = 2047  # the kernel's 11 bits of "distance back to the head" in the classic full index
MAX_FRAMES = 1 << 26
_HEADER = struct.Struct("<8sHHIQQ32s")


class Frame(NamedTuple):
    """One frame. Offsets and sizes in bytes, all multiples of 4 KiB."""

    number: int
    encoded_offset: int
    encoded_size: int
    decoded_offset: int
    decoded_size: int
    digest: bytes  # sha256, 32 bytes, of the encoded bytes


class FrameTable:
    """The frames of one blob, addressable by number, by encoded and by decoded offset."""

    def __init__(
        self,
        blob_digest: Digest,
        encoded_blocks: Sequence[int],
        decoded_blocks: Sequence[int],
        digests: bytes,
    ) -> None:
        if len(encoded_blocks) != len(decoded_blocks) or len(digests) != DIGEST_LENGTH * len(encoded_blocks):
            raise FrameTableError("frame table: its three columns differ in length")
        self.blob_digest = blob_digest
        self._encoded = _starts(encoded_blocks, MAX_ENCODED_BLOCKS, "encoded")
        self._decoded = _starts(decoded_blocks, MAX_DECODED_BLOCKS, "decoded")
        self._digests = digests
        self._identity: bytes | None = None

    @property
    def identity(self) -> bytes:
        """The sha256 of the table's bytes: two that are equal verify the same."""
        if self._identity is None:
            self._identity = hashlib.sha256(self.encode()).digest()
        return self._identity

    def __len__(self) -> int:
        return len(self._encoded) - 1

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < len(self):
            raise IndexError(index)
        encoded, decoded = self._encoded, self._decoded
        return Frame(
            index,
            encoded[index] * BLOCK,
            (encoded[index + 1] - encoded[index]) * BLOCK,
            decoded[index] * BLOCK,
            (decoded[index + 1] - decoded[index]) * BLOCK,
            self._digests[index * DIGEST_LENGTH : (index + 1) * DIGEST_LENGTH],
        )

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(len(self)))

    def frame_decoded_offset(self, index: int) -> int:
        """Where a frame's content begins in the decoded blob, without the rest of the frame."""
        return self._decoded[index] * BLOCK

    def frame_decoded_size(self, index: int) -> int:
        """Bytes that a frame decodes to."""
        return (self._decoded[index + 1] - self._decoded[index]) * BLOCK

    def frame_encoded_size(self, index: int) -> int:
        """Bytes that a frame takes in the blob."""
        return (self._encoded[index + 1] - self._encoded[index]) * BLOCK

    def encoded_size_of(self, frames: range) -> int:
        """Bytes that these frames, one behind the other, take in the blob."""
        return (self._encoded[frames.stop] - self._encoded[frames.start]) * BLOCK if frames else 0

    @property
    def blob_size(self) -> int:
        """Bytes of the blob as the registry holds it."""
        return self._encoded[-1] * BLOCK

    @property
    def decoded_size(self) -> int:
        """Bytes that all frames decode to."""
        return self._decoded[-1] * BLOCK

    def covering(self, offset: int, length: int, *, decoded: bool) -> range:
        """Numbers of the frames that touch [offset, offset + length) of the encoded or decoded blob, clipped to it."""
        starts = self._decoded if decoded else self._encoded
        end = min(offset + length, starts[-1] * BLOCK)
        if offset < 0 or offset >= end:
            return range(0)
        return range(bisect_right(starts, offset // BLOCK) - 1, bisect_right(starts, (end - 1) // BLOCK))

    def encode(self) -> bytes:
        """The table's bytes, as in the module's docstring."""
        count = len(self)
        body = b"".join(
            (
                _HEADER.pack(
                    MAGIC, VERSION, DIGEST_LENGTH, count, self.blob_size, self.decoded_size, self.blob_digest.raw
                ),
                struct.pack(f"<{count}H", *_lengths(self._encoded)),
                struct.pack(f"<{count}H", *_lengths(self._decoded)),
                self._digests,
            )
        )
        return body + struct.pack("<I", crc32c(body))

    @classmethod
    def decode(cls, data: bytes | memoryview) -> FrameTable:
        """Read a table; FrameTableError says what is wrong with it."""
        data = bytes(data)
        if len(data) < _HEADER.size + 4:
            raise FrameTableError(f"frame table: {len(data)} bytes are too short for a header")
        magic, version, digest_length, count, blob_size, decoded_size, blob_digest = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise FrameTableError(f"frame table: unknown magic {magic!r} or version {version}")
        if digest_length != DIGEST_LENGTH:
            raise FrameTableError(f"frame table: digest length {digest_length}, expected {DIGEST_LENGTH}")
        expected = _HEADER.size + count * (4 + DIGEST_LENGTH) + 4
        if count > MAX_FRAMES or len(data) != expected:
            raise FrameTableError(f"frame table: {count} frames need {expected} bytes, got {len(data)}")
        (checksum,) = struct.unpack_from("<I", data, expected - 4)
        if checksum != crc32c(data[: expected - 4]):
            raise FrameTableError("frame table: checksum mismatch")
        encoded = struct.unpack_from(f"<{count}H", data, _HEADER.size)
        decoded = struct.unpack_from(f"<{count}H", data, _HEADER.size + 2 * count)
        table = cls(Digest(blob_digest), encoded, decoded, data[_HEADER.size + 4 * count : expected - 4])
        if (table.blob_size, table.decoded_size) != (blob_size, decoded_size):
            raise FrameTableError("frame table: the header's sizes are not the sum of its frames")
        table._identity = hashlib.sha256(data).digest()
        return table


def _starts(blocks: Sequence[int], limit: int, what: str) -> array[int]:
    starts = array("Q", bytes(8))
    position = 0
    for index, count in enumerate(blocks):
        if not 1 <= count <= limit:
            raise FrameTableError(f"frame table: frame {index} has {count} {what} blocks, allowed 1 to {limit}")
        position += count
        starts.append(position)
    return starts


def _lengths(starts: array[int]) -> list[int]:
    return [after - before for before, after in zip(starts, starts[1:], strict=False)]
