"""Read back where regular files lie: indexes and chunk indexes to extents in frames (model.Extent)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.clusters import PlacedCluster, decode_clusters
from erofs_builder.erofs.inodes import Inode
from erofs_builder.erofs.layout import BLOCK, BLOCK_BITS, blocks_of
from erofs_builder.erofs.source import Source
from erofs_builder.erofs.zeros import zero_frame
from erofs_builder.errors import ErofsError
from erofs_builder.frames import FrameTable
from erofs_builder.model import Blob, Extent


class Device(NamedTuple):
    """A blob and where it lies in the unified address space, in blocks."""

    blob: Blob
    table: FrameTable
    start: int
    blocks: int


class Mapper(Protocol):
    """Extents of a regular file whose size is not 0."""

    def extents(self, inode: Inode) -> tuple[Extent, ...]:
        """Where the file's bytes are; ErofsError if its index is malformed."""


def hole_or_none(source: Source, inode: Inode) -> tuple[Extent, ...] | None:
    """A chunk-based file of a single hole, which both forms have."""
    if inode.layout != on_disk.INODE_CHUNK_BASED:
        return None
    chunks = read_chunks(source, inode)
    if any(address != on_disk.NULL_ADDR for _, address in chunks):
        return None
    return (Extent(None, 0, 0, inode.size),)


def chunk_blocks(inode: Inode) -> int:
    """Blocks of one chunk."""
    if inode.i_u & ~on_disk.CHUNK_FORMAT_BLKBITS_MASK != on_disk.CHUNK_FORMAT_INDEXES:
        raise ErofsError(f"{inode}: unknown chunk format {inode.i_u:#x}")
    return 1 << (inode.i_u & on_disk.CHUNK_FORMAT_BLKBITS_MASK)


def read_chunks(source: Source, inode: Inode) -> list[tuple[int, int]]:
    """(device id, block) of each chunk."""
    count = -(-blocks_of(inode.size) // chunk_blocks(inode))
    data = source.take(inode.end + -inode.end % 8, count * on_disk.CHUNK_INDEX.size, f"{inode}: chunk indexes")
    chunks = []
    for high, device, block in on_disk.CHUNK_INDEX.iter_unpack(data):
        if high:
            raise ErofsError(f"{inode}: a chunk at a 48-bit address")
        chunks.append((device, block))
    return chunks


class DecodedMapper:
    """Chunk-based files over decoded blobs."""

    def __init__(self, source: Source, devices: Sequence[Device]) -> None:
        self._source, self._devices = source, devices
        # Overlapping runs could name every frame over and over; identical ones (deduplicated files) are kept once.
        self._budget = len(source) // 8 + 16 * sum(len(device.table) for device in devices) + 65536
        self._known: dict[tuple[int, int, int], tuple[Extent, ...]] = {}

    def extents(self, inode: Inode) -> tuple[Extent, ...]:
        if inode.layout != on_disk.INODE_CHUNK_BASED:
            raise ErofsError(f"{inode}: a file of layout {inode.layout} in the decoded form")
        found: list[Extent] = []
        for device, start, blocks in self._runs(inode):
            if device:
                found += self._frames(inode, device, start, blocks)
            else:
                found.append(Extent(None, 0, 0, blocks << BLOCK_BITS))
        if len(found) > 1 and any(extent.frame_offset for extent in found):
            raise ErofsError(f"{inode}: data starts inside a frame")
        return _clipped(found, inode.size)

    def _runs(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """(device id or 0, first block, blocks), neighbours joined."""
        chunk, left = chunk_blocks(inode), blocks_of(inode.size)
        run: tuple[int, int, int] | None = None
        for device, block in read_chunks(self._source, inode):
            blocks = min(chunk, left)
            left -= blocks
            if block == on_disk.NULL_ADDR:
                device, block = 0, 0
            elif not 0 < device <= len(self._devices) or block + blocks > self._devices[device - 1].blocks:
                raise ErofsError(f"{inode}: a chunk of {blocks} blocks at {block} of device {device}")
            if run and run[0] == device and (not device or block == run[1] + run[2]):
                run = (device, run[1], run[2] + blocks)
                continue
            if run:
                yield run
            run = (device, block, blocks)
        if run:
            yield run

    def _frames(self, inode: Inode, number: int, start: int, blocks: int) -> tuple[Extent, ...]:
        known = self._known.get((number, start, blocks))
        if known is not None:
            return known
        device = self._devices[number - 1]
        offset, end = start << BLOCK_BITS, start + blocks << BLOCK_BITS
        frames = device.table.covering(offset, end - offset, decoded=True)
        self._budget -= len(frames)
        if self._budget < 0:
            raise ErofsError(f"{inode}: files overlap in too many frames")
        found = []
        for frame in map(device.table.__getitem__, frames):
            first = max(offset, frame.decoded_offset)
            last = min(end, frame.decoded_offset + frame.decoded_size)
            found.append(Extent(device.blob, frame.number, first - frame.decoded_offset, last - first))
        return self._known.setdefault((number, start, blocks), tuple(found))


class EncodedMapper:
    """Files with the classic full index over encoded blobs, and fragments of the packed inode."""

    def __init__(self, source: Source, devices: Sequence[Device]) -> None:
        self._source, self._devices = source, devices
        self._starts = [device.start for device in devices]
        self._packed: tuple[Extent, ...] = ()
        self._packed_starts: list[int] = []

    def load_packed(self, inode: Inode) -> None:
        """Read the packed inode's own index; fragments are looked up there."""
        self._packed = self._index(inode, 0)
        position = 0
        for extent in self._packed:
            self._packed_starts.append(position)
            position += extent.length

    def extents(self, inode: Inode) -> tuple[Extent, ...]:
        hole = hole_or_none(self._source, inode)
        if hole:
            return hole
        if inode.layout != on_disk.INODE_COMPRESSED_FULL:
            raise ErofsError(f"{inode}: a file of layout {inode.layout} in the encoded form")
        head = self._source.peek(inode.end + -inode.end % 8, 8, f"{inode}: map header")
        whole = int.from_bytes(head, "little")
        if whole & on_disk.Z_FRAGMENT_WHOLE:
            return (self._fragment(inode, whole ^ on_disk.Z_FRAGMENT_WHOLE, inode.size),)
        return self._index(inode, on_disk.Z_ADVISE_FRAGMENT_PCLUSTER)

    def _fragment(self, inode: Inode, offset: int, length: int) -> Extent:
        number = bisect_right(self._packed_starts, offset) - 1
        if number < 0:
            raise ErofsError(f"{inode}: a fragment without packed inode")
        extent, inside = self._packed[number], offset - self._packed_starts[number]
        if inside + length > extent.length or inside % BLOCK:
            raise ErofsError(f"{inode}: {length} bytes at {offset} of the packed inode are not in one frame")
        return Extent(extent.blob, extent.frame, inside, length)

    def _index(self, inode: Inode, optional: int) -> tuple[Extent, ...]:
        offset = inode.end + -inode.end % 8
        fragment, advise, algorithm, bits = self._source.unpack(on_disk.Z_MAP_HEADER, offset, f"{inode}: map header")
        known = advise & ~optional == on_disk.Z_ADVISE_BIG_PCLUSTER_1
        if not known or algorithm != on_disk.Z_COMPRESSION_ZSTD or bits > on_disk.Z_LCLUSTER_BITS_MAX:
            raise ErofsError(f"{inode}: map header with advise {advise:#x}, algorithm {algorithm}, cluster bits {bits}")
        count = -(-blocks_of(inode.size) >> bits)
        size = on_disk.Z_INDEX_OFFSET + count * on_disk.Z_LCLUSTER_INDEX.size
        records = self._source.take(offset, size, f"{inode}: index")[on_disk.Z_INDEX_OFFSET :]
        found: list[Extent] = []
        for cluster in decode_clusters(records, bits, blocks_of(inode.size), str(inode)):
            if advise & on_disk.Z_ADVISE_FRAGMENT_PCLUSTER and cluster.is_last:
                left = inode.size - (cluster.start << BLOCK_BITS)
                found.append(self._fragment(inode, fragment | cluster.address << 32, left))
                break
            extent = self._extent(inode, cluster)
            if extent.blob is None and found and found[-1].blob is None:
                extent = Extent(None, 0, 0, found.pop().length + extent.length)
            found.append(extent)
        if len(found) > 1 and any(extent.frame_offset for extent in found):
            raise ErofsError(f"{inode}: data starts inside a frame")
        return _clipped(found, inode.size)

    def _extent(self, inode: Inode, cluster: PlacedCluster) -> Extent:
        length = cluster.blocks << BLOCK_BITS
        number = bisect_right(self._starts, cluster.address) - 1
        if number < 0:
            if self._source.peek(cluster.address << BLOCK_BITS, BLOCK, f"{inode}: frame of zeros") != zero_frame():
                raise ErofsError(f"{inode}: data in the metadata, at block {cluster.address}")
            return Extent(None, 0, 0, length)
        device = self._devices[number]
        local = (cluster.address - device.start) << BLOCK_BITS
        frames = device.table.covering(local, 1, decoded=False)
        frame = device.table[frames[0]] if frames else None
        encoded = cluster.encoded_blocks << BLOCK_BITS
        if frame is None or (frame.encoded_offset, frame.encoded_size) != (local, encoded):
            raise ErofsError(f"{inode}: {encoded} bytes at block {cluster.address} are no frame")
        if length > frame.decoded_size:
            raise ErofsError(f"{inode}: {length} bytes of frame {frame.number}, which has {frame.decoded_size}")
        return Extent(device.blob, frame.number, 0, length)


def _clipped(extents: list[Extent], size: int) -> tuple[Extent, ...]:
    """The extents with the last one's length cut to the file's size."""
    surplus = sum(extent.length for extent in extents) - size
    if surplus:
        last = extents[-1]
        extents[-1] = last._replace(length=last.length - surplus)
    return tuple(extents)
