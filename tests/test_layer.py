"""build_layer: packing, cutting, holes, deduplication, determinism, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erofs_builder import kinds
from erofs_builder.contents import decode_contents, encode_contents
from erofs_builder.errors import TarError, UnsupportedError
from erofs_builder.frames import BLOCK
from erofs_builder.layer import Layer, Options, build_layer
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.packer import cut_sparse
from erofs_builder.pieces import base_pieces
from erofs_builder.tree import flatten, walk
from tests.support.nodes import build, content, decoded_blobs, see_nodes, zstd_decode
from tests.support.tars import Tar, header, pax_header

BIG = b"".join(number.to_bytes(4, "big") * 1024 for number in range(700))


def files(layer: Layer) -> dict[str, Node]:
    return {path.decode(): node for path, node in walk(flatten([layer])) if node.children is None}


def check_contract(layer: Layer) -> None:
    """model.Extent's promises, for every file."""
    for node in files(layer).values():
        assert sum(extent.length for extent in node.extents) == node.size
        for extent in node.extents[:-1]:
            assert extent.length % BLOCK == 0
        for extent in node.extents:
            if extent.blob is None:
                continue
            assert extent.blob.table is not None
            frame = extent.blob.table[extent.frame]
            assert extent.frame_offset % BLOCK == 0
            assert extent.frame_offset == 0 or len(node.extents) == 1
            assert extent.frame_offset + extent.length <= frame.decoded_size


def test_small_files_share_frames_by_kind() -> None:
    tar = Tar()
    for number in range(40):
        tar.add(f"m{number}.py", data=b"def f(): pass\n" * (number + 1))
        tar.add(f"d{number}.txt", data=b"words and words\n" * (number + 1))
    layer, _ = build(bytes(tar))
    check_contract(layer)
    nodes = files(layer)
    frames_of = [
        {extent.frame for name, node in nodes.items() if name.endswith(suffix) for extent in node.extents}
        for suffix in (".py", ".txt")
    ]
    assert not frames_of[0] & frames_of[1]
    assert len(frames_of[0]) < 5


def test_large_files_are_cut_into_frames_in_order() -> None:
    layer, blob = build(bytes(Tar().add("first.txt", data=b"x").add("lib.so", data=b"\x7fELF" + BIG)))
    check_contract(layer)
    extents = files(layer)["lib.so"].extents
    piece = kinds.ELF.piece
    assert [extent.length for extent in extents[:-1]] == [piece] * (len(extents) - 1)
    assert piece // 2 <= extents[-1].length < piece + piece // 2
    assert [extent.frame for extent in extents] == list(range(extents[0].frame, extents[0].frame + len(extents)))
    assert content(files(layer)["lib.so"], decoded_blobs([(layer, blob)])) == b"\x7fELF" + BIG


@pytest.mark.parametrize(("name", "head"), [("var/lib/app/rows.db", b""), ("var/lib/app/rows", b"SQLite format 3\0")])
def test_databases_are_cut_small(name: str, head: bytes) -> None:
    """A query reads single pages: what is fetched and decoded for each is a frame."""
    layer, blob = build(bytes(Tar().add(name, data=head + BIG)))
    check_contract(layer)
    (node,) = files(layer).values()
    assert {extent.length for extent in node.extents[:-1]} == {64 << 10}
    assert content(node, decoded_blobs([(layer, blob)])) == head + BIG


def test_large_data_is_cut_for_reading_here_and_there() -> None:
    """And what is small enough to come whole anyway, or is read from one end to the other, is not."""
    large = BIG * (-(-(4 << 20) // len(BIG)))
    tar = Tar().add("var/lib/app/index", data=large).add("etc/less", data=large[: (4 << 20) - 1])
    layer, blob = build(bytes(tar.add("usr/share/doc/more.txt", data=large)))
    nodes = files(layer)
    names = ("var/lib/app/index", "etc/less", "usr/share/doc/more.txt")
    assert [nodes[name].extents[0].length >> 10 for name in names] == [128, 256, 640]
    assert content(nodes["var/lib/app/index"], decoded_blobs([(layer, blob)])) == large


def test_identical_files_and_pieces_are_stored_once() -> None:
    tar = Tar().add("a", data=b"same").add("b", data=b"same").add("c.bin", data=BIG).add("d.bin", data=BIG)
    tar.add("e.bin", data=BIG + b"a changed end")
    layer, blob = build(bytes(tar))
    nodes = files(layer)
    assert nodes["a"].extents == nodes["b"].extents
    assert nodes["c.bin"].extents == nodes["d.bin"].extents
    assert nodes["e.bin"].extents[:-1] == nodes["c.bin"].extents[:-1]
    once, _ = build(bytes(Tar().add("a", data=b"same").add("c.bin", data=BIG)))
    assert once.blob is not None
    assert once.blob.table is not None
    assert len(zstd_decode(blob)) <= once.blob.table.decoded_size + 2 * kinds.OTHER.piece


def test_a_packed_file_cannot_stand_for_a_piece() -> None:
    """The end of a cut file equals a small file that lies within a frame: it needs a frame of its own."""
    piece = kinds.OTHER.piece
    random_bytes = random.Random(1).randbytes(piece // 2)
    tar = Tar().add("x", data=b"first in the frame").add("small", data=random_bytes)
    big = random.Random(2).randbytes(piece) + random_bytes
    layer, blob = build(bytes(tar.add("big", data=big + b"").add("again", data=big)))
    check_contract(layer)
    decoded = decoded_blobs([(layer, blob)])
    assert content(files(layer)["big"], decoded) == big
    assert files(layer)["again"].extents == files(layer)["big"].extents


def test_zero_pieces_are_holes() -> None:
    data = BIG[: kinds.OTHER.piece] + bytes(5 * kinds.OTHER.piece) + b"end" + bytes(kinds.OTHER.piece)
    layer, blob = build(bytes(Tar().add("f", data=data).add("z", data=bytes(9000)).add("tiny", data=bytes(100))))
    check_contract(layer)
    nodes = files(layer)
    holes = [extent.length for extent in nodes["f"].extents if extent.blob is None]
    assert holes == [5 * kinds.OTHER.piece]
    assert nodes["z"].extents == (Extent(None, 0, 0, 9000),)
    assert nodes["tiny"].extents[0].blob is not None
    assert content(nodes["f"], decoded_blobs([(layer, blob)])) == data
    assert layer.blob is not None
    assert layer.blob.table is not None
    assert layer.blob.table.decoded_size < 3 * kinds.OTHER.piece


def sparse(name: str, size: int, segments: list[tuple[int, bytes]]) -> bytes:
    """A sparse entry in format 0.1."""
    numbers = b",".join(b"%d,%d" % (offset, len(data)) for offset, data in segments)
    stored = b"".join(data for _, data in segments)
    records = {"GNU.sparse.map": numbers, "GNU.sparse.size": b"%d" % size, "GNU.sparse.name": name.encode()}
    return (
        pax_header(records)
        + header(b"GNUSparseFile.0/f", size=b"%011o\0" % len(stored))
        + stored
        + bytes(-len(stored) % 512)
    )


def test_sparse_and_plain_archives_give_the_same_extents() -> None:
    size = 3_000_001
    segments = [(4096, b"a" * 700_000), (2_000_000, b"b"), (size - 1, b"c")]
    plain = bytearray(size)
    for offset, data in segments:
        plain[offset : offset + len(data)] = data
    one, blob_one = build(sparse("f", size, segments))
    other, blob_other = build(bytes(Tar().add("f", data=bytes(plain))))
    assert blob_one == blob_other
    assert [extent[1:] for extent in files(one)["f"].extents] == [extent[1:] for extent in files(other)["f"].extents]
    assert content(files(one)["f"], decoded_blobs([(one, blob_one)])) == bytes(plain)


def test_a_file_of_two_tebibytes_of_hole() -> None:
    size = 2 << 40
    layer, blob = build(sparse("f", size, [(0, b"start"), (size - 5, b"stop!")]))
    node = files(layer)["f"]
    assert [extent.blob is None for extent in node.extents] == [False, True, False]
    assert sum(extent.length for extent in node.extents) == node.size == size
    assert len(blob) < 20_000
    empty, blob = build(sparse("f", size, []))
    assert (files(empty)["f"].extents, empty.blob, blob) == ((Extent(None, 0, 0, size),), None, b"")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_cutting_sparse_files(data: st.DataObject) -> None:
    piece = 4 * BLOCK
    size = data.draw(st.integers(1, 20 * piece))
    count = data.draw(st.integers(0, 6))
    points = sorted(data.draw(st.lists(st.integers(0, size), min_size=2 * count, max_size=2 * count)))
    segments = tuple((low, high - low) for low, high in zip(points[::2], points[1::2], strict=True) if high > low)
    whole = bytearray(size)
    stored = b""
    for offset, length in segments:
        part = random.Random(offset).randbytes(length)
        whole[offset : offset + length] = part
        stored += part
    stream = io.BytesIO(stored)
    pieces = list(cut_sparse(size, piece, stream.read, segments))
    assert b"".join(bytes(length) if part is None else part for length, part, _ in pieces) == whole
    assert all(length % piece == 0 for length, _, _ in pieces[:-1])
    assert [len(part or b"") or length for length, part, _ in pieces] == [length for length, _, _ in pieces]
    assert all(part is None or hashlib.sha256(part).digest() == digest for _, part, digest in pieces)


def test_base_content_is_left_out() -> None:
    base, base_blob = build(bytes(Tar().add("pad", data=b"p").add("small", data=b"same").add("big", data=BIG)))
    assert base.blob is not None
    index = decode_contents(encode_contents([(base.blob.digest, base.contents)]))
    blob = Blob(base.blob.table, from_base=True)
    pieces = base_pieces(index, {blob.digest: blob})
    tar = bytes(Tar().add("s", data=b"same").add("b", data=BIG + b"new end").add("n", data=b"new"))
    layer, layer_blob = build(tar, base=pieces)
    check_contract(layer)
    nodes = files(layer)
    assert nodes["s"].extents[0].blob is blob
    assert {extent.blob for extent in nodes["b"].extents[:-1]} == {blob}
    assert len(layer_blob) < len(base_blob) / 3
    decoded = {**decoded_blobs([(layer, layer_blob)]), blob: zstd_decode(base_blob)}
    assert content(nodes["b"], decoded) == BIG + b"new end"
    stored = {piece.digest for piece in layer.contents}
    assert not stored & {piece.digest for piece in base.contents}
    nothing, empty = build(bytes(Tar().add("s", data=b"same")), base=pieces)
    assert (nothing.blob, empty) == (None, b"")


def test_a_layer_without_data_has_no_blob() -> None:
    layer, blob = build(bytes(Tar().add("d", "dir").add("e").add("l", "symlink", linkname="x")))
    assert (layer.blob, blob) == (None, b"")
    assert files(layer)["e"].extents == ()


def test_contents_say_where_everything_is() -> None:
    layer, blob = build(bytes(Tar().add("a", data=b"aa").add("b.txt", data=b"bb").add("big", data=BIG)))
    decoded = zstd_decode(blob)
    assert layer.blob is not None
    assert layer.blob.table is not None
    assert sum(piece.length for piece in layer.contents) == 4 + len(BIG)
    for piece in layer.contents:
        start = layer.blob.table[piece.frame].decoded_offset + piece.offset
        assert hashlib.sha256(decoded[start : start + piece.length]).digest() == piece.digest


TREES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b/c", "b/d.py", "e.so", "f.txt", "g/h/i.gz", "j.h"]),
        st.integers(0, 700_000),
        st.integers(0, 3),
    ),
    max_size=12,
)


@given(TREES, st.integers(1, 70_000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_bytes_depend_on_the_tar_alone(specs: list[tuple[str, int, int]], step: int, threads: int) -> None:
    tar = Tar()
    expected: dict[str, bytes] = {}
    for name, size, seed in specs:
        data = (random.Random(seed).randbytes(5000) * (size // 5000 + 1))[:size] if seed else bytes(size)
        tar.add(name, data=data)
        expected[name] = data
    plain = bytes(tar)
    layer, blob = build(plain)
    check_contract(layer)
    decoded = decoded_blobs([(layer, blob)])
    assert {name: content(node, decoded) for name, node in files(layer).items()} == expected

    class Steps(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or -1, step))

    out = io.BytesIO()
    again = build_layer(Steps(gzip.compress(plain, 1)), out, options=Options(threads=threads))
    assert out.getvalue() == blob
    assert see_nodes(flatten([again]), decoded_blobs([(again, blob)])) == see_nodes(flatten([layer]), decoded)


def test_progress_adds_up() -> None:
    seen: list[int] = []
    build_layer(io.BytesIO(bytes(Tar().add("a", data=b"123").add("d", "dir"))), io.BytesIO(), on_progress=seen.append)
    assert seen == [3, 0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "x" * 256}, "256 bytes"),
        ({"name": "d/" * 2100}, "a path of"),
        ({"name": "s", "kind": "symlink", "linkname": "x" * 4096}, "s: a symlink target of 4096"),
        ({"name": "s", "kind": "symlink", "linkname": ""}, "s: a symlink target of 0"),
        ({"name": "c", "kind": "char", "devmajor": 5000}, "c: device number 5000:0"),
        ({"name": "u", "pax_headers": {"uid": "4294967296"}}, "u: uid 4294967296"),
        ({"name": "g", "pax_headers": {"gid": "-2147483649"}}, "g: gid -2147483649"),
    ],
)
def test_what_erofs_cannot_hold_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build(bytes(Tar().add(**entry)))


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(TarError, match="NUL"):
        build(pax_header({"path": b"a\0b"}) + header())


def test_negative_ids_wrap_as_in_the_kernel() -> None:
    layer, _ = build(bytes(Tar().add("f", pax_headers={"uid": "-2", "gid": "4294967294"})))
    assert (files(layer)["f"].uid, files(layer)["f"].gid) == (0xFFFFFFFE, 0xFFFFFFFE)


def test_a_cut_off_layer_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(TarError, match="cut off"):
        build(bytes(Tar().add("f", data=BIG))[: len(BIG) // 2])
    assert threading.active_count() == before


def _program(size: int) -> bytes:
    """Bytes that repeat themselves as machine code does: short sequences, some with a number in them."""
    chance = random.Random(size)
    sequences = [chance.randbytes(chance.randrange(2, 9)) for _ in range(400)]
    out = bytearray(b"\x7fELF")
    while len(out) < size:
        out += sequences[min(chance.randrange(400), chance.randrange(400))]
        if chance.random() < 0.2:
            out += chance.randrange(1 << 14).to_bytes(4, "little")
    return bytes(out[:size])


def _text(size: int) -> bytes:
    """Words, the first ones more often than the last ones."""
    chance = random.Random(size)
    words = [bytes(chance.choices(b"etaoinshrdlu", k=chance.randrange(2, 10))) for _ in range(900)]
    out = bytearray()
    while len(out) < size:
        out += words[min(chance.randrange(900), chance.randrange(900))] + b" "
    return bytes(out[:size])


def test_golden_blob() -> None:
    """The same layer, the same bytes, on any machine: another digest means that registries hold every blob twice.

    Text, code and noise, so that it depends on every setting of the compressors.
    """
    tar = Tar().add("d", "dir")
    for number in range(60):
        tar.add(f"d/{number}.txt", data=_text(number * 370))
        tar.add(f"d/{number}.bin", data=_program(number * 410))
        tar.add(f"d/{number}.py", data=random.Random(number).randbytes(number * 50))
    tar.add("big.so", data=_program(900_000)).add("big.md", data=_text(1_100_000))
    tar.add("zeros.so", data=b"\x7fELF" + BIG).add("noise", data=random.Random(9).randbytes(700_000))
    layer, _ = build(bytes(tar))
    assert layer.blob is not None
    assert str(layer.blob.digest) == "sha256:6c620987cbaa3ce6ecb3be536084ae21743c6ca7b6cdc7ca895a4683d531a5d0"
