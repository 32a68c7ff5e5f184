"""The decoded form of regular files: chunk-based, 8-byte indexes, the largest chunk that maps a file exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from erofs_builder.erofs.layout import BLOCK_BITS, CHUNK_INDEX, INODE_CHUNK_BASED, NULL_ADDR, blocks_of
from erofs_builder.erofs.regular import (
    EMPTY,
    EMPTY_BODY,
    SPARSE_INDEX_MAX,
    Body,
    chunk_bits,
    chunk_format,
)
from erofs_builder.errors import UnsupportedError
from erofs_builder.model import Blob, Node


class Run(NamedTuple):
    """Consecutive blocks of a file in one decoded blob (blob None: a hole); `start` is a block of the blob."""

    blob: Blob | None
    start: int
    blocks: int


class DecodedFiles:
    """Implements regular.Files for the decoded form."""

    def __init__(self) -> None:
        self._addresses: dict[Blob, tuple[int, int]] = {}

    def note(self, node: Node) -> None:
        """Nothing: files are independent of each other."""

    def plan(self, blobs: list[Blob]) -> Node | None:
        return None

    def measure(self, node: Node) -> tuple[int, int]:
        if not node.size:
            return EMPTY
        if len(node.extents) == 1 and node.extents[0].blob is not None:
            return INODE_CHUNK_BASED, CHUNK_INDEX.size  # nearly all files: one chunk in one frame
        runs = list(_runs(node))
        bits = _exact_chunk_bits(runs)
        size = CHUNK_INDEX.size * -(-blocks_of(node.size) >> bits)
        if size > SPARSE_INDEX_MAX and any(run.blob is None for run in runs):
            raise UnsupportedError(
                f"a sparse file of {node.size} bytes with data in between needs {size} bytes of index"
            )
        return INODE_CHUNK_BASED, size

    def place(self, addresses: dict[Blob, tuple[int, int]], zero_block: int) -> None:
        self._addresses = addresses

    def body(self, node: Node) -> Body:
        if not node.size:
            return EMPTY_BODY
        if len(node.extents) == 1 and (short := self.short(node)):
            return Body(short[0], short[1].to_bytes(CHUNK_INDEX.size, "little"))
        runs = list(_runs(node))
        bits = _exact_chunk_bits(runs)
        chunk = 1 << bits
        indexes = []
        for run in runs:
            if run.blob is None:
                indexes.append(CHUNK_INDEX.pack(0, 0, NULL_ADDR) * -(-run.blocks >> bits))
                continue
            device, base = self._addresses[run.blob]
            start = base + run.start
            indexes += [CHUNK_INDEX.pack(0, device, block) for block in range(start, start + run.blocks, chunk)]
        return Body(chunk_format(bits), b"".join(indexes))

    def short(self, node: Node) -> tuple[int, int] | None:
        blob, frame, offset, length = node.extents[0]
        if blob is None or blob.table is None:
            return None
        device, base = self._addresses[blob]
        block = base + ((blob.table.frame_decoded_offset(frame) + offset) >> BLOCK_BITS)
        return chunk_format(chunk_bits(blocks_of(length))), block << 32 | device << 16  # CHUNK_INDEX


def _runs(node: Node) -> Iterator[Run]:
    # Frames of one blob that follow each other are one run: the decoded blob is their concatenation.
    blob: Blob | None = None
    start = blocks = 0
    for extent in node.extents:
        count = blocks_of(extent.length)
        position = 0
        if extent.blob is not None and extent.blob.table is not None:
            position = (extent.blob.table.frame_decoded_offset(extent.frame) + extent.frame_offset) >> BLOCK_BITS
        follows = extent.blob is blob and (blob is None or position == start + blocks)
        if blocks and not follows:
            yield Run(blob, start, blocks)
            blocks = 0
        if not blocks:
            blob, start = extent.blob, position
        blocks += count
    if blocks:
        yield Run(blob, start, blocks)


def _exact_chunk_bits(runs: list[Run]) -> int:
    """log2 of the blocks of the largest chunk none of which crosses from one run into the next."""
    boundaries = position = 0
    for run in runs[:-1]:
        position += run.blocks
        boundaries |= position
    if not boundaries:
        return chunk_bits(runs[0].blocks)
    return min((boundaries & -boundaries).bit_length() - 1, chunk_bits(position + runs[-1].blocks))
