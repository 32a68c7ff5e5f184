"""What both forms say of regular files, and the checks of what a Node's extents promise (model.Extent)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from erofs_builder.erofs.layout import (
    BLOCK,
    CHUNK_FORMAT_BLKBITS_MASK,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX,
    INODE_FLAT_PLAIN,
    NULL_ADDR,
    blocks_of,
)
from erofs_builder.model import Blob, Extent, Node

# A larger index for one file means gigabytes of metadata for a sparse file: better refused by name.
SPARSE_INDEX_MAX = 64 << 20


class Body(NamedTuple):
    """What a regular file's inode points at: i_u, and the bytes at the 8-aligned end of inode and xattrs."""

    i_u: int
    data: bytes


class Files(Protocol):
    """How one form represents regular files. In this order: note*, plan, measure*, place, then body* and short*."""

    def note(self, node: Node) -> None:
        """Learn of a file, in the order of inodes."""

    def plan(self, blobs: list[Blob]) -> Node | None:
        """All files are known; `blobs` are those used, in device order. The packed inode, if one is needed."""

    def measure(self, node: Node) -> tuple[int, int]:
        """(data layout, bytes of the body)."""

    def place(self, addresses: dict[Blob, tuple[int, int]], zero_block: int) -> None:
        """Learn each blob's (device id, first block) and the block of the zero frame."""

    def body(self, node: Node) -> Body:
        """The body, as long as `measure` said."""

    def short(self, node: Node) -> tuple[int, int] | None:
        """i_u and body of a file that is one extent in a blob, if that body has 8 bytes: as a little-endian number."""


def check_extents(node: Node) -> None:
    """ValueError if a file's extents break the contract of model.Extent: a mistake of the builder, not of the image."""
    if len(node.extents) == 1 and _is_sound(node.extents[0], node.size):
        return
    total = 0
    last = len(node.extents) - 1
    for number, extent in enumerate(node.extents):
        total += extent.length
        if extent.length <= 0 or (number < last and extent.length % BLOCK):
            raise ValueError(f"extent {number} has length {extent.length}")
        if extent.blob is None:
            continue
        table = extent.blob.table
        if table is None:
            raise ValueError("a file refers to a blob that is not complete")
        if not 0 <= extent.frame < len(table):
            raise ValueError(f"extent {number} lies in frame {extent.frame} of {len(table)}")
        decoded_size = table.frame_decoded_size(extent.frame)
        if extent.frame_offset % BLOCK or (last and extent.frame_offset):
            raise ValueError(f"extent {number} starts at {extent.frame_offset} of its frame")
        if extent.frame_offset + extent.length > decoded_size:
            raise ValueError(f"extent {number} reaches beyond its frame of {decoded_size} bytes")
    if total != node.size:
        raise ValueError(f"the extents' {total} bytes are not the size, {node.size}")


def _is_sound(extent: Extent, size: int) -> bool:
    """Whether nothing is wrong with a file's only extent, in a blob; said at once, for nearly all files."""
    blob, frame, offset, length = extent
    table = blob.table if blob else None
    if table is None or not 0 <= frame < len(table) or not 0 < length == size or offset % BLOCK:
        return False
    return offset + length <= table.frame_decoded_size(frame)


def is_hole(node: Node) -> bool:
    """Whether a file of some size has no data at all."""
    return all(extent.blob is None for extent in node.extents)


def data_blocks(node: Node) -> int:
    """Blocks of a file that are not holes: what `du` shows."""
    return min(sum(blocks_of(extent.length) for extent in node.extents if extent.blob is not None), 0xFFFFFFFF)


EMPTY = (INODE_FLAT_PLAIN, 0)
EMPTY_BODY = Body(NULL_ADDR, b"")


def chunk_bits(blocks: int) -> int:
    """The smallest chunk, as log2 of its blocks, that takes `blocks` in one; or the largest there is."""
    return min((blocks - 1).bit_length(), CHUNK_FORMAT_BLKBITS_MASK)


def chunk_format(bits: int) -> int:
    """i_u of a chunk-based inode with 8-byte indexes."""
    return CHUNK_FORMAT_INDEXES | bits


def hole_body(node: Node) -> Body:
    """A file that is one hole, in either form: chunks without address, one up to 8 TiB."""
    blocks = blocks_of(node.size)
    bits = chunk_bits(blocks)
    return Body(chunk_format(bits), CHUNK_INDEX.pack(0, 0, NULL_ADDR) * -(-blocks >> bits))
