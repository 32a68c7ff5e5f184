"""Physical clusters as the classic full index has them: one record of 8 bytes for each logical cluster of a file.

A logical cluster is one block, or up to 16 in large files, where that makes the index 16 times smaller. The record in
whose logical cluster a physical one (a frame) starts is its HEAD: the offset there, and the address. The others are
NONHEAD: distances to this and the next head; the first one has the blocks that the frame takes instead of the former.
A frame of a single record is taken to be as long as a logical cluster, so only one-block records may stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from erofs_builder.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    Z_LCLUSTER_BITS_MAX,
    Z_LCLUSTER_HEAD1,
    Z_LCLUSTER_INDEX,
    Z_LCLUSTER_NONHEAD,
    Z_LCLUSTER_NONHEAD_INDEX,
    Z_LI_D0_CBLKCNT,
    Z_LI_PARTIAL_REF,
)
from erofs_builder.erofs.zeros import ZERO_FRAME_BLOCKS
from erofs_builder.errors import ErofsError

_SPAN_MAX = 0x800  # records of one cluster: the distance back has 11 bits
_LARGEST = 1 << Z_LCLUSTER_BITS_MAX
_ZERO_STEP = ZERO_FRAME_BLOCKS & -_LARGEST


class Cluster(NamedTuple):
    """A frame, or the beginning of one, as a part of a file. In blocks."""

    blocks: int
    address: int
    encoded_blocks: int
    partial: bool = False


def fitting_bits(lengths: Sequence[int]) -> int:
    """log2 of the largest logical cluster (in blocks) with which clusters of these lengths can be told apart."""
    for bits in range(Z_LCLUSTER_BITS_MAX, 0, -1):
        if all(span > 1 for span in _spans(lengths, bits)):
            return bits
    return 0


def _spans(lengths: Sequence[int], bits: int) -> Iterator[int]:
    """How many records each cluster has."""
    start = 0
    for number, blocks in enumerate(lengths, 1):
        end = start + blocks
        is_last = number == len(lengths)
        yield (-(-end >> bits) if is_last else end >> bits) - (start >> bits)
        start = end


def encode_clusters(clusters: Sequence[Cluster], bits: int) -> bytes:
    """The records of a file made of these clusters; `bits` from `fitting_bits`, or 0."""
    records = []
    start = 0
    spans = [cluster.blocks for cluster in clusters]
    for cluster, span in zip(clusters, _spans(spans, bits) if bits else spans, strict=True):
        advise = Z_LCLUSTER_HEAD1 | (Z_LI_PARTIAL_REF if cluster.partial else 0)
        offset = (start & ((1 << bits) - 1)) << BLOCK_BITS
        records.append(Z_LCLUSTER_INDEX.pack(advise, offset, cluster.address))
        if span > 1:
            length = Z_LI_D0_CBLKCNT | cluster.encoded_blocks
            records.append(Z_LCLUSTER_NONHEAD_INDEX.pack(Z_LCLUSTER_NONHEAD, 0, length, span - 1))
            records.append(nonhead_records(span))
        start += cluster.blocks
    return b"".join(records)


@lru_cache(maxsize=256)
def nonhead_records(span: int) -> bytes:
    """The third and later records of a cluster of `span` ones."""
    pack = Z_LCLUSTER_NONHEAD_INDEX.pack
    return b"".join([pack(Z_LCLUSTER_NONHEAD, 0, back, span - back) for back in range(2, span)])


def cut_hole(blocks: int) -> list[int]:
    """Lengths of the pieces, each read from the frame of zeros, that a hole is made of."""
    if blocks <= ZERO_FRAME_BLOCKS:
        return [blocks]
    count, rest = divmod(blocks, _ZERO_STEP)
    lengths = [_ZERO_STEP] * count
    if 0 < rest < 2 * _LARGEST:
        # So short a piece could not be told apart with large logical clusters: take from the one before.
        lengths[-1] -= _ZERO_STEP // 2 & -_LARGEST
        rest += _ZERO_STEP // 2 & -_LARGEST
    return [*lengths, rest] if rest else lengths


class PlacedCluster(NamedTuple):
    """A cluster as it is read back; `start` in blocks of the file."""

    start: int
    blocks: int
    address: int
    encoded_blocks: int
    is_last: bool


def decode_clusters(records: bytes, bits: int, total: int, what: str) -> Iterator[PlacedCluster]:
    """The clusters of a file of `total` blocks, in order; ErofsError, naming `what`, if the records are malformed."""
    size = Z_LCLUSTER_INDEX.size
    count = len(records) // size
    position = start = 0
    head = Z_LCLUSTER_INDEX.unpack_from(records)
    if head[1]:
        raise ErofsError(f"{what}: the first cluster starts at {head[1]}")
    while position < count:
        if head[0] & ~Z_LI_PARTIAL_REF != Z_LCLUSTER_HEAD1:
            raise ErofsError(f"{what}: record {position} has advise {head[0]:#x} where a cluster should start")
        following, encoded = _decode_span(records, position, count, what)
        if following - position == 1 and bits:
            raise ErofsError(f"{what}: a cluster of one record, {position}")
        address, end = head[2], total
        if following < count:
            head = Z_LCLUSTER_INDEX.unpack_from(records, following * size)
            if head[1] % BLOCK or head[1] >= BLOCK << bits:
                raise ErofsError(f"{what}: a cluster at {head[1]} of record {following}")
            end = (following << bits) + (head[1] >> BLOCK_BITS)
        yield PlacedCluster(start, end - start, address, encoded, following == count)
        start, position = end, following


def _decode_span(records: bytes, position: int, count: int, what: str) -> tuple[int, int]:
    """(the record behind a cluster's last one, blocks that its frame takes)."""
    size = Z_LCLUSTER_INDEX.size
    following = position + 1
    if following == count or records[following * size] != Z_LCLUSTER_NONHEAD:
        return following, 1
    advise, offset, encoded, ahead = Z_LCLUSTER_NONHEAD_INDEX.unpack_from(records, following * size)
    following += ahead
    span = following - position
    if not 2 <= span <= _SPAN_MAX or following > count:
        raise ErofsError(f"{what}: a cluster of {span} records from {position} on")
    inner = records[(position + 2) * size : following * size]
    if advise != Z_LCLUSTER_NONHEAD or offset or not encoded & Z_LI_D0_CBLKCNT or inner != nonhead_records(span):
        raise ErofsError(f"{what}: the records from {position} on are malformed")
    return following, encoded & ~Z_LI_D0_CBLKCNT
