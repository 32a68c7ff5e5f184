"""The C loops against their twins in Python (tests/support/twins.py), and against what others say."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder import hot
from erofs_builder.hot import Sha256, crc32c, crc32c_state, parse_tar_header, scan_tar_headers, sha256_many
from tests.support import twins
from tests.support.tars import checked, header

SIZES = st.sampled_from(
    [b"00000000000\0", b"00000000777\0", b"00000001000\0", b"77777777777\0", b"\x80" + bytes(9) + b"\2\0", b"\xff" * 12]
)
KINDS = st.sampled_from(b"\x0001234567xgLKSDAV\xff")


def test_crc32c_of_the_standard() -> None:
    """RFC 3720, B.4, and the check value of the catalogue of CRCs."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 7))
def test_crc32c(data: bytes, cut: int, offset: int) -> None:
    """At any alignment, and in two parts."""
    view = memoryview(b"x" * offset + data)[offset:]
    assert crc32c(view) == twins.crc32c(data)
    state = crc32c_state(crc32c_state(0xFFFFFFFF, data[:cut]), data[cut:])
    assert state ^ 0xFFFFFFFF == twins.crc32c(data)


@given(st.lists(st.tuples(KINDS, SIZES, st.integers(0, 3)), max_size=70), st.integers(0, 600), st.integers(0, 3))
def test_scan(specs: list[tuple[int, bytes, int]], cut: int, broken: int) -> None:
    data = b"".join(header(b"f", bytes([kind]), size=size) + bytes(512 * blocks) for kind, size, blocks in specs)
    if broken and len(data) >= 512:
        at = (len(data) // 512 // broken) * 512 - 512
        data = data[:at] + checked(b"\xff" * 512) + data[at + 512 :]
    data = data[: len(data) - cut] if cut < len(data) else b""
    found = scan_tar_headers(data)
    expected = twins.scan_tar_headers(data)
    assert [record[:2] for record in found] == [record[:2] for record in expected]
    assert [record for record in found if not record[1]] == [record for record in expected if not record[1]]


@given(st.sampled_from([100, 108, 116, 124, 136, 148, 329, 337]), st.binary(min_size=12, max_size=12), st.booleans())
def test_numbers_of_headers(at: int, field: bytes, gnu: bool) -> None:
    block = bytearray(header(b"f", magic=b"ustar  \0" if gnu else b"ustar\x0000"))
    block[at : at + 8] = field[:8]
    if at in (124, 136):
        block[at : at + 12] = field
    for attempt in (bytes(block), checked(block)):
        status, fields = parse_tar_header(attempt)
        expected, expected_fields = twins.parse_tar_header(attempt)
        assert status == expected
        assert status or fields == expected_fields


# Lengths at which the padding takes one block or two, and longer ones.
LENGTHS = st.sampled_from([0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 4096, 5000])


@given(st.lists(st.tuples(st.integers(0, 300), LENGTHS), max_size=9), st.booleans())
def test_digests_of_many(places: list[tuple[int, int]], in_c: bool) -> None:
    data = memoryview(bytes(range(251)) * 22)
    with pytest.MonkeyPatch.context() as patch:
        if not in_c:
            patch.setattr(hot, "_LANES", 0)
        found = sha256_many(data, places)
    assert found == [hashlib.sha256(data[offset : offset + length]).digest() for offset, length in places]


@given(
    st.lists(st.tuples(LENGTHS, st.lists(st.tuples(st.integers(0, 300), LENGTHS), max_size=3)), max_size=6),
    st.booleans(),
)
def test_a_stream_beside_others(steps: list[tuple[int, list[tuple[int, int]]]], in_c: bool) -> None:
    data = memoryview(bytes(range(251)) * 22)
    plain = hashlib.sha256()
    with pytest.MonkeyPatch.context() as patch:
        if not in_c:
            patch.setattr(hot, "_LANES", 0)
        stream = Sha256()
        for length, places in steps:
            plain.update(data[7 : 7 + length])
            found = stream.beside(data[7 : 7 + length], data, places)
            assert found == [hashlib.sha256(data[at : at + size]).digest() for at, size in places]
            assert stream.digest() == plain.digest()


def test_digests_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="not in the data"):
        sha256_many(b"abc", [(0, 1), (2, 2)])
