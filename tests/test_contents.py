"""The content index: round trip, and every way in which one can be malformed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder.contents import Contents, decode_contents, encode_contents
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.hot import crc32c
from erofs_builder.model import Blob
from erofs_builder.pieces import Pieces, base_pieces
from tests.support.nodes import build
from tests.support.tars import Tar

PIECES = st.tuples(
    st.binary(min_size=32, max_size=32), st.integers(0, 1 << 26), st.integers(0, 2046), st.integers(1, 4096)
)


def index_of(*blobs: list[tuple[bytes, int, int, int]]) -> list[tuple[Digest, Contents]]:
    found = []
    for number, pieces in enumerate(blobs):
        contents = Contents()
        for digest, frame, block, length in pieces:
            contents.append(digest, frame, block * 4096, length)
        found.append((Digest.of(bytes([number])), contents))
    return found


@given(st.lists(st.lists(PIECES, max_size=5), max_size=4))
def test_round_trip(blobs: list[list[tuple[bytes, int, int, int]]]) -> None:
    index = index_of(*blobs)
    found = decode_contents(encode_contents(index))
    assert [(digest, list(contents)) for digest, contents in found] == [
        (digest, list(contents)) for digest, contents in index
    ]


def test_golden_bytes() -> None:
    """On-disk format: change only with a version bump."""
    data = encode_contents(index_of([(b"d" * 32, 7, 3, 1234)]))
    body = b"EROFSCI\x01" + struct.pack("<HHI", 1, 0, 1) + Digest.of(b"\0").raw + struct.pack("<I", 1)
    body += struct.pack("<IIH", 7, 1234, 3) + b"d" * 32
    assert data == body + struct.pack("<I", crc32c(body))


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", crc32c(body))


GOOD = encode_contents(index_of([(b"d" * 32, 7, 3, 1234)], []))[:-4]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:10],
        GOOD + b"\0\0\0\0",
        sealed(b"X" + GOOD[1:]),
        sealed(GOOD[:8] + b"\2" + GOOD[9:]),
        sealed(GOOD[:12] + b"\xff" * 4 + GOOD[16:]),
        sealed(GOOD[:48] + b"\xff" * 4 + GOOD[52:]),
        sealed(GOOD[:56] + b"\0" * 4 + GOOD[60:]),
        sealed(GOOD[:60] + b"\xff\xff" + GOOD[62:]),
        sealed(GOOD + b"more"),
    ],
    ids=["empty", "short", "checksum", "magic", "version", "blobs", "pieces", "length", "offset", "trailing"],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="content index"):
        decode_contents(data)


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode_contents(data)


def test_a_base_index_that_points_outside_its_blob_is_refused() -> None:
    layer, _ = build(bytes(Tar().add("f", data=b"x" * 10)))
    assert layer.blob is not None
    blob = Blob(layer.blob.table, from_base=True)
    pieces = list(layer.contents)
    assert base_pieces([(blob.digest, layer.contents)], {blob.digest: blob})[pieces[0].digest].length == 10
    for frame, offset, length in ((1, 0, 1), (0, 65536, 1), (0, 4096, 61441)):
        wrong = Contents()
        wrong.append(b"d" * 32, frame, offset, length)
        with pytest.raises(ArtifactError, match="content index"):
            base_pieces([(blob.digest, wrong)], {blob.digest: blob})
    assert base_pieces([(Digest.of(b"other"), layer.contents)], {blob.digest: blob}) == {}


def test_digests_that_begin_alike_are_told_apart() -> None:
    pieces = Pieces()
    digests = [b"begin " + bytes([number]) * 26 for number in range(4)]
    for number, digest in enumerate(digests[:3]):
        assert pieces.find(digest, at_start=False) is None
        assert pieces.add(digest, number, 4096, 10) == number
    assert [pieces.find(digest, at_start=False) for digest in digests] == [0, 1, 2, None]
    assert pieces.find(digests[1], at_start=True) is None
    assert pieces.add(digests[1], 7, 0, 10) == 3
    assert (pieces.find(digests[1], at_start=True), pieces.find(digests[1], at_start=False)) == (3, 1)
