"""Where the bytes of a regular file are: the data half of the second reader (docs/format.md, 4.1 to 4.3)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from tests.format_reader import BLOCK, DECODED, ENCODED, MAX_CONTENT_BLOCKS, Blob, decode_frame, is_zero, require, take

HOLE = 0xFFFFFFFF
PLAIN, FULL_INDEX, INLINE, CHUNKS = 0, 1, 2, 4
FRAGMENT_INODE = 1 << 63


@dataclass(frozen=True)
class Extent:
    """`length` bytes of a file at `start`: from `skip` in the content of a frame, or zeros where `blob` is None."""

    start: int
    length: int
    blob: int | None = None
    frame: int = 0
    skip: int = 0


@dataclass(frozen=True)
class Slot:
    """A device slot; `start` is its first block in the unified address space."""

    tag: bytes
    blocks: int
    start: int


@dataclass
class Inode:
    """An inode as it lies in the metadata; `body` is where its extended attributes end."""

    nid: int
    layout: int
    mode: int
    size: int
    union: int
    uid: int
    gid: int
    mtime: int
    nlink: int
    body: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class Mapper:
    """The data of one form's files. `slots` are in the order of `blobs`."""

    def __init__(self, form: int, data: bytes, blobs: list[Blob], slots: list[Slot]) -> None:
        self._form, self._data, self._blobs, self._slots = form, data, blobs, slots
        self.packed: list[Extent] = []

    def extents(self, inode: Inode) -> list[Extent]:
        """The data of a regular file, in order."""
        if inode.size == 0:
            require(inode.layout == PLAIN, "empty file: layout")
            return []
        if inode.layout == CHUNKS:
            return self._chunk_extents(inode)
        require(self._form == ENCODED and inode.layout == FULL_INDEX, "file: layout")
        at = -(-inode.body // 8) * 8
        (header,) = struct.unpack("<Q", take(self._data, at, 8, "map header"))
        if header & FRAGMENT_INODE:
            return self._fragment(header ^ FRAGMENT_INODE, 0, inode.size)
        return self._indexed_extents(inode, at)

    def _fragment(self, offset: int, start: int, length: int) -> list[Extent]:
        """`length` bytes of the packed inode, as the bytes of a file from `start` on."""
        require(offset % BLOCK == 0, "fragment: not at the start of a block")
        found, end = [], offset + length
        for extent in self.packed:
            low, high = max(offset, extent.start), min(end, extent.start + extent.length)
            if low < high:
                skip = extent.skip + low - extent.start
                found.append(Extent(start + low - offset, high - low, extent.blob, extent.frame, skip))
        require(sum(each.length for each in found) == length, "fragment outside the packed inode")
        return found

    def _chunk_extents(self, inode: Inode) -> list[Extent]:
        require(self._form == DECODED or inode.size > 256 << 20, "encoded form: a small hole with chunks")
        require(inode.union & ~0x3F == 0 and bool(inode.union & 0x20), "chunk format")
        chunk = BLOCK << (inode.union & 31)
        count = -(-inode.size // chunk)
        raw = take(self._data, -(-inode.body // 8) * 8, 8 * count, "chunk indexes")
        found: list[Extent] = []
        for number, (zero, device, block) in enumerate(struct.iter_unpack("<HHI", raw)):
            start = number * chunk
            length = min(chunk, inode.size - start)
            require(zero == 0, "chunk index: reserved bytes")
            if block == HOLE:
                found.append(Extent(start, length))
                continue
            require(self._form == DECODED, "encoded form: a chunk with data")
            require(1 <= device <= len(self._blobs), "chunk index: device")
            found += self._decoded_range(device - 1, block * BLOCK, start, length)
        return found

    def _decoded_range(self, device: int, at: int, start: int, length: int) -> Iterator[Extent]:
        """`length` bytes of a decoded blob at the decoded offset `at`, frame by frame."""
        table = self._blobs[device].table
        require(at + -(-length // BLOCK) * BLOCK <= table.decoded_size, "chunk behind the end of the device")
        end = at + length
        for frame, position in enumerate(table.positions):
            low = max(at, position * BLOCK)
            high = min(end, (position + table.content_blocks[frame]) * BLOCK)
            if low < high:
                yield Extent(start + low - at, high - low, device, frame, low - position * BLOCK)
        tail = -length % BLOCK
        if tail:
            require(is_zero(self._tail(device, end, tail)), "bytes behind the end of a file are not zero")

    def _tail(self, device: int, at: int, length: int) -> bytes:
        for frame, position in enumerate(self._blobs[device].table.positions):
            offset = at - position * BLOCK
            if 0 <= offset < self._blobs[device].table.content_blocks[frame] * BLOCK:
                return self._blobs[device].content(frame)[offset : offset + length]
        return b""

    def _indexed_extents(self, inode: Inode, at: int) -> list[Extent]:
        low, advise, algorithm, bits = struct.unpack("<IHBB", take(self._data, at, 8, "map header"))
        require(advise & ~0x20 == 0x2 and algorithm == 3 and bits <= 4, "map header")
        require(bits == 0 or inode.size > 64 << 10, "map header: large clusters in a small file")
        require(is_zero(take(self._data, at + 8, 8, "map header")), "map header: reserved bytes")
        tail = bool(advise & 0x20)
        require(tail or low == 0, "map header: first field")
        cluster = BLOCK << bits
        raw = take(self._data, at + 16, 8 * -(-inode.size // cluster), "records")
        records = list(struct.iter_unpack("<HHHH", raw))
        heads = [number for number, record in enumerate(records) if record[0] & 0x7FFF == 1]
        require(bool(heads) and heads[0] == 0, "records: the first one")
        starts = [number * cluster + records[number][1] for number in heads]
        require(starts[0] == 0 and all(start % BLOCK == 0 for start in starts), "records: start in the cluster")
        found: list[Extent] = []
        ends = zip([*heads[1:], len(records)], [*starts[1:], inode.size], strict=True)
        for head, start, (following, end) in zip(heads, starts, ends, strict=True):
            require(records[head][1] < cluster and start < end, "records: start in the cluster")
            partial, blocks = self._run(records[head:following], bits)
            address = _le32(records[head])
            if tail and end == inode.size:
                require(blocks == 1 and not partial, "records: the packed tail")
                found += self._fragment(low | address << 32, start, end - start)
            else:
                found.append(self._frame_extent(address, blocks, partial, Extent(start, end - start)))
                whole = end % BLOCK == 0 or found[-1].blob is None
                require(whole, "records: a last frame that is not decoded to its end")
        return found

    @staticmethod
    def _run(records: list[tuple[int, ...]], bits: int) -> tuple[bool, int]:
        """The records of one frame: the partial bit of the first, the blocks that the second states."""
        require(bits == 0 or len(records) > 1, "records: a frame with one record in large clusters")
        blocks = 1
        for number, (kind, zero, back, forward) in enumerate(records[1:], 1):
            require(kind == 2 and zero == 0, "records: type")
            require(forward == len(records) - number, "records: distance to the next frame")
            if number == 1:
                require(bool(back & 0x800), "records: blocks of the frame")
                blocks = back ^ 0x800
            else:
                require(back == number, "records: distance back")
        return bool(records[0][0] & 0x8000), blocks

    def _frame_extent(self, address: int, blocks: int, partial: bool, part: Extent) -> Extent:
        for number, slot in enumerate(self._slots):
            if slot.start <= address < slot.start + slot.blocks:
                table = self._blobs[number].table
                frame = table.starts.get(address - slot.start, -1)
                require(frame >= 0, "records: not the first block of a frame")
                require(blocks == table.blocks[frame], "records: blocks of the frame differ from the table")
                self._check_partial(partial, part.length, table.content_blocks[frame], blocks)
                return Extent(part.start, part.length, number, frame)
        zero = take(self._data, address * BLOCK, BLOCK, "zero frame")
        require(blocks == 1 and _decodes_to_zeros(zero), "zero frame")
        self._check_partial(partial, part.length, MAX_CONTENT_BLOCKS, 1)
        return part

    @staticmethod
    def _check_partial(partial: bool, length: int, content: int, blocks: int) -> None:
        require(length <= content * BLOCK, "records: more than the frame's content")
        require(partial == (length < max(content, blocks) * BLOCK), "records: the partial bit")


def _le32(record: tuple[int, ...]) -> int:
    return int(record[2] | record[3] << 16)


@lru_cache(4)
def _decodes_to_zeros(data: bytes) -> bool:
    return is_zero(decode_frame(data, MAX_CONTENT_BLOCKS))
