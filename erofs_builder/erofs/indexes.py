"""The encoded form of regular files: the kernel's classic full index, and the packed inode for what shares frames.

A frame is a physical cluster (clusters.py). Files that share frames are ranges (fragments) of one hidden file, the
packed inode, which is written the same way. A file's last block, where no index record can hold it, is a fragment too.
"""

from __future__ import annotations

import stat
from array import array

from erofs_builder.erofs.clusters import Cluster, cut_hole, encode_clusters, fitting_bits
from erofs_builder.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    INODE_CHUNK_BASED,
    INODE_COMPRESSED_FULL,
    Z_ADVISE_BIG_PCLUSTER_1,
    Z_ADVISE_FRAGMENT_PCLUSTER,
    Z_COMPRESSION_ZSTD,
    Z_FRAGMENT_WHOLE,
    Z_INDEX_OFFSET,
    Z_LCLUSTER_BITS_MAX,
    Z_LCLUSTER_INDEX,
    Z_MAP_HEADER,
    blocks_of,
)
from erofs_builder.erofs.regular import (
    EMPTY,
    EMPTY_BODY,
    SPARSE_INDEX_MAX,
    Body,
    data_blocks,
    hole_body,
    is_hole,
)
from erofs_builder.errors import UnsupportedError
from erofs_builder.frames import Frame
from erofs_builder.model import Blob, Extent, Node

# Larger files, and the packed inode, get larger logical clusters, if their frames allow: a sixteenth of the index.
SMALL_CLUSTERS_MAX = 64 << 10
HOLE_INDEX_MAX = 256 << 20
_SHARED = 2  # saturating count of files in a frame
_NOT_PACKED = -1


class EncodedFiles:
    """Implements regular.Files for the encoded form."""

    def __init__(self) -> None:
        self._uses: dict[Blob, bytearray] = {}
        self._packed: dict[Blob, array[int]] = {}  # offset of each frame in the packed inode
        self._addresses: dict[Blob, tuple[int, int]] = {}
        self._zero_block = 0
        self.needs_zero_frame = False

    def note(self, node: Node) -> None:
        extents = node.extents
        if not extents or _is_chunked(node):
            return
        if len(extents) > 1 or extents[0].blob is None:
            self.needs_zero_frame |= any(extent.blob is None for extent in extents)
            if _is_fragment(extents[-1]):
                self._use(extents[-1], _SHARED)
        else:
            first = extents[0]
            self._use(first, _SHARED if first.frame_offset or _is_fragment(first) else 1)

    def _use(self, extent: Extent, count: int) -> None:
        blob = extent.blob
        if blob is None or blob.table is None:
            return
        uses = self._uses.get(blob)
        if uses is None:
            uses = self._uses[blob] = bytearray(len(blob.table))
        uses[extent.frame] = min(uses[extent.frame] + count, _SHARED)

    def plan(self, blobs: list[Blob]) -> Node | None:
        extents: list[Extent] = []
        size = 0
        for blob in blobs:
            uses = self._uses.get(blob)
            if uses is None or blob.table is None:
                continue
            offsets = array("q", [_NOT_PACKED]) * len(uses)
            for number, count in enumerate(uses):
                if count < _SHARED:
                    continue
                frame = blob.table[number]
                if frame.decoded_size == BLOCK < frame.encoded_size:
                    raise ValueError(f"frame {number} takes more than one block for one block of content")
                offsets[number] = size
                size += frame.decoded_size
                extents.append(Extent(blob, number, 0, frame.decoded_size))
            self._packed[blob] = offsets
        if not extents:
            return None
        return Node(mode=stat.S_IFREG | 0o400, size=size, extents=tuple(extents))

    def measure(self, node: Node) -> tuple[int, int]:
        if not node.size:
            return EMPTY
        if len(node.extents) == 1 and self._fragment(node.extents[0]) is not None:
            return INODE_COMPRESSED_FULL, Z_MAP_HEADER.size
        if _is_chunked(node):
            return INODE_CHUNK_BASED, len(hole_body(node).data)
        # Cutting a hole of a petabyte into pieces, to see what fits them, takes long: most of it can be told first.
        least = _index_size(node, Z_LCLUSTER_BITS_MAX)
        size = least if least > SPARSE_INDEX_MAX else index_size(node)
        if size > SPARSE_INDEX_MAX and any(extent.blob is None for extent in node.extents):
            raise UnsupportedError(
                f"a sparse file of {node.size} bytes with data in between needs {size} bytes of index"
            )
        return INODE_COMPRESSED_FULL, size

    def place(self, addresses: dict[Blob, tuple[int, int]], zero_block: int) -> None:
        self._addresses, self._zero_block = addresses, zero_block

    def body(self, node: Node) -> Body:
        if not node.size:
            return EMPTY_BODY
        if len(node.extents) == 1 and (short := self.short(node)):
            return Body(short[0], short[1].to_bytes(Z_MAP_HEADER.size, "little"))
        if _is_chunked(node):
            return hole_body(node)
        return Body(data_blocks(node), self._index(node))

    def short(self, node: Node) -> tuple[int, int] | None:
        fragment = self._fragment(node.extents[0])
        return None if fragment is None else (blocks_of(node.size), fragment | Z_FRAGMENT_WHOLE)

    def _fragment(self, extent: Extent) -> int | None:
        """The extent's offset in the packed inode, if it lies there."""
        if extent.blob is None:
            return None
        offsets = self._packed.get(extent.blob)
        offset = offsets[extent.frame] if offsets else _NOT_PACKED
        return None if offset == _NOT_PACKED else offset + extent.frame_offset

    def packed_body(self, packed: Node) -> Body:
        """The packed inode's own index."""
        return Body(data_blocks(packed), self._index(packed))

    def _index(self, node: Node) -> bytes:
        clusters = [cluster for extent in node.extents[:-1] for cluster in self._clusters(extent)]
        advise, fragment = Z_ADVISE_BIG_PCLUSTER_1, 0
        last = node.extents[-1]
        tail = self._fragment(last) if len(node.extents) > 1 and _is_fragment(last) else None
        if tail is None:
            clusters += self._clusters(last)
        else:
            advise |= Z_ADVISE_FRAGMENT_PCLUSTER
            fragment = tail & 0xFFFFFFFF
            clusters.append(Cluster(blocks_of(last.length), tail >> 32, 1))
        bits = _cluster_bits(node)
        header = Z_MAP_HEADER.pack(fragment, advise, Z_COMPRESSION_ZSTD, bits)
        return b"".join((header, bytes(Z_INDEX_OFFSET - len(header)), encode_clusters(clusters, bits)))

    def _clusters(self, extent: Extent) -> list[Cluster]:
        blocks = blocks_of(extent.length)
        if extent.blob is None or extent.blob.table is None:
            return [Cluster(length, self._zero_block, 1, True) for length in cut_hole(blocks)]
        frame = extent.blob.table[extent.frame]
        if blocks == 1 and frame.encoded_size > BLOCK:
            raise ValueError(f"one block of frame {frame.number}, which takes more than one, before a file's end")
        _, base = self._addresses[extent.blob]
        address = base + (frame.encoded_offset >> BLOCK_BITS)
        return [Cluster(blocks, address, frame.encoded_size >> BLOCK_BITS, _is_partial(extent, frame))]


def _is_chunked(node: Node) -> bool:
    # fsck.erofs 1.9 does not extract a hole at a file's end, so only large files are left to the index that has holes.
    return node.size > HOLE_INDEX_MAX and is_hole(node)


def index_size(node: Node) -> int:
    """Bytes of a file's map header and index."""
    return _index_size(node, _cluster_bits(node))


def _index_size(node: Node, bits: int) -> int:
    return Z_INDEX_OFFSET + Z_LCLUSTER_INDEX.size * -(-blocks_of(node.size) >> bits)


def _cluster_bits(node: Node) -> int:
    if node.size <= SMALL_CLUSTERS_MAX:
        return 0
    lengths: list[int] = []
    for extent in node.extents:
        blocks = blocks_of(extent.length)
        lengths += cut_hole(blocks) if extent.blob is None else [blocks]
    return fitting_bits(lengths)


def _is_fragment(extent: Extent) -> bool:
    """Whether a file's last extent is read through the packed inode, although its frame may be all its own.

    Either it has one block of a frame that takes several, which no record can say. Or the file ends within a block:
    the kernel would stop decoding there, ahead of the zeros that fill the frame, and never come to the checksum. The
    packed inode has whole frames, so what is read of it is checked.
    """
    if extent.blob is None or extent.blob.table is None:
        return False
    if extent.length % BLOCK:
        return True
    return extent.length == BLOCK < extent.blob.table.frame_encoded_size(extent.frame)


def _is_partial(extent: Extent, frame: Frame) -> bool:
    # The file does not read the frame's very end (fsck.erofs counts the padding behind a file's last byte too), or the
    # frame takes more bytes than it gives, which kernels from 7.0 on refuse without the flag.
    return extent.length != frame.decoded_size or extent.length < frame.encoded_size
