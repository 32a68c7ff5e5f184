"""Data blobs for tests of what lies above them: a plain frame writer, apart from the builder's own packer."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from erofs_builder.digest import Digest
from erofs_builder.frames import BLOCK, FrameTable
from erofs_builder.model import Blob, Extent

FRAME = 64 * BLOCK


def encode_frame(content: bytes) -> bytes:
    """A frame of the format: zstd with size and checksum, then a skippable frame up to the next block."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=20, write_checksum=True, write_content_size=True
    )
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(content)
    gap = -len(data) % BLOCK
    if gap:
        gap += BLOCK if gap < 8 else 0
        data += struct.pack("<II", 0x184D2A50, gap - 8) + bytes(gap - 8)
    return data


@dataclass
class SampleBlob:
    """A blob in the making. `add` files, then `finish`; `encoded` and `decoded` are its two forms."""

    blob: Blob = field(default_factory=Blob)
    encoded: bytearray = field(default_factory=bytearray)
    decoded: bytearray = field(default_factory=bytearray)
    _encoded_blocks: list[int] = field(default_factory=list)
    _decoded_blocks: list[int] = field(default_factory=list)
    _digests: bytearray = field(default_factory=bytearray)
    _pack: bytearray = field(default_factory=bytearray)
    _pack_frame: int | None = None

    def add_packed(self, content: bytes) -> tuple[Extent, ...]:
        """A small file, packed with others in one frame. Finish the frame with `flush`."""
        if len(self._pack) + len(content) > FRAME:
            self.flush()
        extent = Extent(self.blob, len(self._decoded_blocks), len(self._pack), len(content))
        self._pack += content + bytes(-len(content) % BLOCK)
        return (extent,)

    def flush(self) -> None:
        if self._pack:
            pack, self._pack = bytes(self._pack), bytearray()
            self._frame(pack)

    def add_frames(self, content: bytes, size: int = FRAME) -> tuple[Extent, ...]:
        """A large file in frames of its own, `size` bytes each."""
        self.flush()
        extents = []
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            extents.append(Extent(self.blob, self._frame(piece), 0, len(piece)))
        return tuple(extents)

    def _frame(self, content: bytes) -> int:
        content += bytes(-len(content) % BLOCK)
        data = encode_frame(content)
        if len(content) == BLOCK < len(data):
            # One block of content in two blocks: no index record could say so; see model.Extent.
            content += bytes(BLOCK)
            data = encode_frame(content)
        self.encoded += data
        self.decoded += content
        self._encoded_blocks.append(len(data) // BLOCK)
        self._decoded_blocks.append(len(content) // BLOCK)
        self._digests += hashlib.sha256(data).digest()
        return len(self._decoded_blocks) - 1

    def finish(self) -> Blob:
        self.flush()
        digest = Digest.of(self.encoded)
        self.blob.table = FrameTable(digest, self._encoded_blocks, self._decoded_blocks, bytes(self._digests))
        return self.blob

    def write(self, encoded: Path, decoded: Path) -> None:
        encoded.write_bytes(self.encoded)
        decoded.write_bytes(self.decoded)
