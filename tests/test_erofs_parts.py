"""The parts of the EROFS writer, each against the format, another program, or its own inverse."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder.erofs import clusters, dirs, layout, xattrs
from erofs_builder.erofs.clusters import Cluster, PlacedCluster
from erofs_builder.erofs.zeros import ZERO_FRAME_BLOCKS, zero_frame
from erofs_builder.errors import ErofsError, UnsupportedError

SIZES = {
    "SUPER": 128,
    "INODE_COMPACT": 32,
    "INODE_EXTENDED": 64,
    "DIRENT": 12,
    "DEVICE_SLOT": 128,
    "XATTR_IBODY_HEADER": 12,
    "XATTR_ENTRY": 4,
    "CHUNK_INDEX": 8,
    "Z_MAP_HEADER": 8,
    "Z_LCLUSTER_INDEX": 8,
    "Z_LCLUSTER_NONHEAD_INDEX": 8,
    "Z_ZSTD_CFGS": 8,
}


@pytest.mark.parametrize("name", SIZES)
def test_structure_sizes(name: str) -> None:
    assert getattr(layout, name).size == SIZES[name]


@given(st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
def test_device_numbers(major: int, minor: int) -> None:
    assert layout.decode_rdev(layout.encode_rdev(major, minor)) == (major, minor)


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        # From xxhsum's own vectors and from `xxhsum -H32`.
        (b"", 0, 0x02CC5D05),
        (b"", 2654435761, 0x36B78AE7),
        (b"a", 0, 0x550D7456),
        (b"abc", 0, 0x32D153FF),
        (b"Nobody inspects the spammish repetition", 0, 0xE2293B2F),
    ],
)
def test_xxh32(data: bytes, seed: int, expected: int) -> None:
    assert xattrs.xxh32(data, seed) == expected


@pytest.mark.parametrize(
    ("name", "index", "suffix"),
    [
        (b"user.a", 1, b"a"),
        (b"system.posix_acl_access", 2, b""),
        (b"system.posix_acl_default", 3, b""),
        (b"trusted.overlay.opaque", 4, b"overlay.opaque"),
        (b"security.capability", 6, b"capability"),
    ],
)
def test_xattr_namespaces(name: bytes, index: int, suffix: bytes) -> None:
    assert xattrs.split_name(name) == (index, suffix)


@pytest.mark.parametrize(
    "name", [b"system.nfs4_acl", b"btrfs.compression", b"user.", b"user", b"system.posix_acl_access.x", b""]
)
def test_xattrs_that_erofs_cannot_hold(name: bytes) -> None:
    with pytest.raises(UnsupportedError, match="namespace"):
        xattrs.XattrTable().add({name: b"v"})


def test_xattr_limits() -> None:
    with pytest.raises(UnsupportedError, match="such a name"):
        xattrs.XattrTable().add({b"user." + b"n" * 256: b""})
    with pytest.raises(UnsupportedError, match="65536 bytes"):
        xattrs.XattrTable().add({b"user.n": bytes(65536)})
    table = xattrs.XattrTable()
    table.add({f"user.{number}".encode(): bytes(60000) for number in range(5)})
    with pytest.raises(UnsupportedError, match="on one file"):
        table.layout()


def test_xattrs_that_several_inodes_have_are_stored_once() -> None:
    table = xattrs.XattrTable()
    common = {b"user.common": b"c" * 100}
    table.add(common)
    table.add({**common, b"user.own": b"o"})
    table.layout()
    assert table.area == xattrs.encode_entry(b"user.common", b"c" * 100)
    assert table.body(common) == layout.XATTR_IBODY_HEADER.pack(_filter(b"user.common"), 1) + bytes(4)
    own = table.body({**common, b"user.own": b"o"})
    assert own.endswith(xattrs.encode_entry(b"user.own", b"o"))
    assert xattrs.icount(own) == 1 + (len(own) - 12) // 4


def _filter(*names: bytes) -> int:
    value = 0xFFFFFFFF
    for name in names:
        value &= ~(1 << xattrs.filter_bit(name))
    return value


@given(st.sets(st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 47} & set(name)), max_size=80))
def test_directory_data(children: set[bytes]) -> None:
    names = dirs.sorted_names(children - {b".", b".."})
    data = dirs.encode(names, range(1, len(names) + 1), [layout.FT_DIR] * len(names))
    assert len(data) == dirs.data_size(names)
    found = []
    for start in range(0, len(data), layout.BLOCK):
        block = data[start : start + layout.BLOCK]
        first = layout.DIRENT.unpack_from(block)[1]
        records = list(layout.DIRENT.iter_unpack(block[:first]))
        ends = [record[1] for record in records[1:]] + [len(block)]
        found += [(block[r[1] : end].rstrip(b"\0"), r[0]) for r, end in zip(records, ends, strict=True)]
    assert found == list(zip(names, range(1, len(names) + 1), strict=True))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256])
def test_names_that_no_directory_holds(name: bytes) -> None:
    with pytest.raises(UnsupportedError):
        dirs.check_names([b"fine", name])


lengths = st.lists(st.integers(1, ZERO_FRAME_BLOCKS), min_size=1, max_size=12)


@given(lengths, st.booleans())
def test_clusters_come_back(blocks: list[int], larger: bool) -> None:
    bits = clusters.fitting_bits(blocks) if larger else 0
    encoded = [1 if count == 1 else min(count, 256) for count in blocks]
    written = [Cluster(*each, bool(each[0] % 2)) for each in zip(blocks, range(1, 99), encoded, strict=False)]
    records = clusters.encode_clusters(written, bits)
    assert len(records) == 8 * -(-sum(blocks) >> bits)
    read = list(clusters.decode_clusters(records, bits, sum(blocks), "test"))
    starts = [sum(blocks[:number]) for number in range(len(blocks))]
    assert read == [
        PlacedCluster(start, cluster.blocks, cluster.address, cluster.encoded_blocks, start == starts[-1])
        for start, cluster in zip(starts, written, strict=True)
    ]


@pytest.mark.parametrize(
    ("blocks", "bits"), [([32] * 5, 4), ([31, 32], 3), ([64, 17], 4), ([64, 16], 3), ([1], 0), ([2, 2], 0), ([4, 3], 1)]
)
def test_logical_cluster_size(blocks: list[int], bits: int) -> None:
    assert clusters.fitting_bits(blocks) == bits


@given(st.integers(1, 1 << 20))
def test_holes_are_cut_into_zero_frames(blocks: int) -> None:
    pieces = clusters.cut_hole(blocks)
    assert sum(pieces) == blocks and max(pieces) <= ZERO_FRAME_BLOCKS
    assert len(pieces) == 1 or min(pieces) >= 32


@given(st.binary(min_size=8, max_size=400), st.integers(0, 4))
def test_malformed_records(data: bytes, bits: int) -> None:
    data = data[: len(data) & -8]
    try:
        for cluster in clusters.decode_clusters(data, bits, len(data) // 8 << bits, "test"):
            assert cluster.blocks > 0
    except ErofsError:
        pass


def test_frame_of_zeros_decodes() -> None:
    frame = zero_frame()
    assert len(frame) == layout.BLOCK
    done = subprocess.run(["zstd", "-dc"], input=frame, check=True, capture_output=True)
    assert done.stdout == bytes(ZERO_FRAME_BLOCKS * layout.BLOCK)
