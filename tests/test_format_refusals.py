"""What breaks a rule of docs/format.md is refused, by the reader that was written from it and by the project's own."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from erofs_builder.contents import decode_contents
from erofs_builder.erofs import flat
from erofs_builder.errors import FormatError as OwnFormatError
from erofs_builder.errors import IntegrityError
from erofs_builder.frames import Frame
from erofs_builder.frames import FrameTable as OwnFrameTable
from erofs_builder.payload import decode_payload
from tests.format_reader import (
    BLOB_TYPE,
    BLOCK,
    DECODED,
    ENCODED,
    Blob,
    FormatError,
    Layout,
    check_contents,
    decode_frame,
    parse_contents,
    parse_frame_table,
    parse_payload,
    read_artifact,
)
from tests.images.layout import Layout as Writer
from tests.support.format_image import NOISE, Image, changed, flip, make_image, put
from tests.support.oracles import BUILDER


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("refusals") / "tree")


# Frames


def make_frame(content: bytes = bytes(BLOCK), checksum: bool = True, size: bool = True, window: int = 20) -> bytes:
    """A frame as the page wants it, or not, with its padding."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window, write_checksum=checksum, write_content_size=size
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(len(content) if size else -1)
    return pad(compressor.compress(content) + compressor.flush())


def pad(frame: bytes, blocks: int = 0) -> bytes:
    """A zstd frame with a skippable one behind it, of `blocks` blocks more than it needs."""
    gap = -len(frame) % BLOCK
    gap += BLOCK * (blocks + (0 < gap < 8))
    return frame + (struct.pack("<II", 0x184D2A50, gap - 8) + bytes(gap - 8) if gap else b"")


@pytest.mark.parametrize("size", [BLOCK - 13, BLOCK - 17, BLOCK - 25, BLOCK, 2 * BLOCK])
def test_frames_of_every_end_are_read(size: int) -> None:
    content = NOISE[:size] + bytes(-size % BLOCK)
    assert decode_frame(make_frame(content), len(content) // BLOCK) == content


BAD_FRAMES = {
    "no content checksum": make_frame(checksum=False),
    "content size not stated": make_frame(size=False),
    "window above 1 MiB": make_frame(bytes(3 << 20), window=21),
    "reserved bit": changed(make_frame(), flip(4, 8)),
    "dictionary": changed(make_frame(), flip(4, 1)),
    "no zstd frame": changed(make_frame(), flip(0)),
    "padding not zero": changed(make_frame(), flip(BLOCK - 1)),
    "whole blocks": make_frame()[:-1],
    "more blocks": pad(make_frame()[:32].rstrip(b"\0"), 1),
    "content size differs": make_frame(bytes(2 * BLOCK)),
    "behind the end": make_frame(NOISE[: 2 * BLOCK])[:BLOCK],
}


# What the project's reader of tables sees; its decoder need not.
OF_THE_TABLE = ("whole blocks", "more blocks")


@pytest.mark.parametrize("rule", BAD_FRAMES)
def test_frames_that_break_a_rule_are_refused(rule: str) -> None:
    blocks = 768 if "window" in rule else 1
    with pytest.raises(FormatError, match="behind the end|more blocks" if "more" in rule else rule):
        decode_frame(BAD_FRAMES[rule], blocks)
    if rule not in OF_THE_TABLE:
        with pytest.raises(IntegrityError):
            flat.decode_frame(BAD_FRAMES[rule], Frame(0, 0, BLOCK, 0, blocks * BLOCK, bytes(32)), "of a test")


def test_changed_blobs_are_refused(image: Image) -> None:
    """Against the blob's digest, the frame's digest and zstd's checksum, each with the ones before it made right."""
    table = image.artifact.blobs[0].table
    bad = changed(image.blob, flip(20_000))
    with pytest.raises(FormatError, match="blob: digest"):
        Blob(bad, table)
    table = replace(table, digest=hashlib.sha256(bad).digest())
    with pytest.raises(FormatError, match="frame: digest"):
        Blob(bad, table).check()
    spans = [(start * BLOCK, (start + table.blocks[frame]) * BLOCK) for start, frame in table.starts.items()]
    digests = tuple(hashlib.sha256(bad[start:end]).digest() for start, end in spans)
    with pytest.raises(FormatError, match="frame: "):
        Blob(bad, replace(table, digests=digests)).check()


# Frame table, trailer, content index: every byte is covered by a checksum; with it made right, by a rule


def test_every_byte_of_a_table_is_covered(image: Image) -> None:
    table = image.tables[0]
    for offset in range(0, len(table), 7):
        bad = changed(table, flip(offset))
        with pytest.raises(FormatError):
            parse_frame_table(bad)
        with pytest.raises(OwnFormatError):
            OwnFrameTable.decode(bad)


BAD_TABLES = {
    "magic": flip(3),
    "version": put("<H", 8, 2),
    "digest length": put("<H", 10, 20),
    "behind the end": put("<I", 12, 1 << 20),
    "number of frames": put("<I", 12, (1 << 26) + 1),
    "size of the blob": put("<Q", 16, BLOCK),
    "size of the decoded blob": put("<Q", 24, BLOCK),
    "blocks of a frame": put("<H", 64, 0),
    "blocks of a frame ": put("<H", 64, 257),
}


@pytest.mark.parametrize("rule", BAD_TABLES)
def test_tables_that_break_a_rule_are_refused(image: Image, rule: str) -> None:
    bad = changed(image.tables[0], BAD_TABLES[rule], seal=True)
    with pytest.raises(FormatError, match=rule.strip()):
        parse_frame_table(bad)
    with pytest.raises(OwnFormatError):
        OwnFrameTable.decode(bad)


@pytest.mark.parametrize("blocks", [0, 2048])
def test_contents_of_a_frame_have_1_to_2047_blocks(image: Image, blocks: int) -> None:
    frames = image.artifact.blobs[0].table.blocks
    bad = changed(image.tables[0], put("<H", 64 + 2 * len(frames), blocks), seal=True)
    with pytest.raises(FormatError, match="blocks of a content"):
        parse_frame_table(bad)
    with pytest.raises(OwnFormatError):
        OwnFrameTable.decode(bad)


def test_every_byte_of_a_trailer_is_covered(image: Image) -> None:
    payload = image.payloads[DECODED]
    for offset in range(-48, 0):
        bad = changed(payload, flip(offset))
        with pytest.raises(FormatError):
            parse_payload(bad)
        with pytest.raises(OwnFormatError):
            decode_payload(bad)


BAD_TRAILERS = {
    "magic": flip(-48),
    "version": put("<H", -40, 2),
    "form": put("<B", -38, 3),
    "size of the metadata": put("<Q", -32, 4096),
    "sizes do not add up": put("<Q", -32, 1 << 40),
    "size of the frame tables": put("<I", -36, 0),
    "frame table": put("<I", -36, 2),
    "padding not zero": put("<Q", -24, 100),
    "sizes do not add up ": put("<Q", -16, 1 << 40),
}


@pytest.mark.parametrize("rule", BAD_TRAILERS)
def test_trailers_that_break_a_rule_are_refused(image: Image, rule: str) -> None:
    payload = image.payloads[ENCODED]
    trailer = bytearray(payload[-48:])
    bad = payload[:-48] + changed(bytes(trailer), BAD_TRAILERS[rule], seal=True)
    with pytest.raises(FormatError, match=rule.strip()):
        parse_payload(bad)
    with pytest.raises(OwnFormatError):
        decode_payload(bad)


def test_payloads_that_are_cut_are_refused(image: Image) -> None:
    for bad in (b"", image.payloads[ENCODED][:-1], image.payloads[ENCODED][:-65536]):
        with pytest.raises(FormatError):
            parse_payload(bad)
        with pytest.raises(OwnFormatError):
            decode_payload(bad)


def test_padding_of_a_payload_is_zero(image: Image) -> None:
    with pytest.raises(FormatError, match="padding"):
        parse_payload(changed(image.payloads[ENCODED], flip(-49)))


def test_every_byte_of_a_content_index_is_covered(image: Image) -> None:
    for offset in range(len(image.contents)):
        bad = changed(image.contents, flip(offset))
        with pytest.raises(FormatError):
            parse_contents(bad)
        with pytest.raises(OwnFormatError):
            decode_contents(bad)


BAD_INDEXES = {
    "magic": flip(1),
    "version": put("<H", 8, 2),
    "size": put("<I", 12, 0),
    "behind the end": put("<I", 12, 2),
    "behind the end ": put("<I", 48, 1 << 30),
}


@pytest.mark.parametrize("rule", BAD_INDEXES)
def test_content_indexes_that_break_a_rule_are_refused(image: Image, rule: str) -> None:
    bad = changed(image.contents, BAD_INDEXES[rule], seal=True)
    with pytest.raises(FormatError, match=rule.strip()):
        parse_contents(bad)
    with pytest.raises(OwnFormatError):
        decode_contents(bad)


def test_pieces_that_are_not_in_the_blobs_are_refused(image: Image) -> None:
    blobs = {blob.table.digest: blob for blob in image.artifact.blobs}
    count = struct.unpack_from("<I", image.contents, 48)[0]
    lengths = 52 + 4 * count
    for change in (flip(16), put("<I", 52, 1 << 20), put("<I", lengths, 1 << 29), flip(-5), flip(lengths)):
        with pytest.raises(FormatError):
            check_contents(parse_contents(changed(image.contents, change, seal=True)), blobs)


# Artifact


def rewrite(image: Image, target: Path, change: Callable[[Writer, dict[str, Any]], None]) -> Path:
    """A copy of the layout whose manifest `change` has changed."""
    source, writer = Writer(image.layout), Writer(target)
    manifest = source.manifest("latest")
    for one in [manifest["config"], *manifest["layers"]]:
        writer.blob_path(one["digest"]).hardlink_to(source.blob_path(one["digest"]))
    change(writer, manifest)
    descriptor = writer.add_bytes(json.dumps(manifest).encode(), manifest["mediaType"])
    writer.tag("latest", {**descriptor, "artifactType": manifest["artifactType"]})
    return target


def run_check(layout: Path) -> subprocess.CompletedProcess[str]:
    """The project's own check of every byte."""
    return subprocess.run([BUILDER, "check", f"oci:{layout}:latest"], capture_output=True, text=True, timeout=60)


def _other_type(_: Writer, manifest: dict[str, Any]) -> None:
    manifest["artifactType"] = "application/vnd.erofs-ondemand.image.v2+json"


def _cut_size(_: Writer, manifest: dict[str, Any]) -> None:
    manifest["layers"][-1]["annotations"]["org.erofs-ondemand.payload-size"] = "65536"


def _no_size(_: Writer, manifest: dict[str, Any]) -> None:
    del manifest["layers"][-1]["annotations"]


def _no_blob(_: Writer, manifest: dict[str, Any]) -> None:
    del manifest["layers"][0]


def _no_payload(_: Writer, manifest: dict[str, Any]) -> None:
    manifest["layers"] = [layer for layer in manifest["layers"] if "metadata" not in layer["mediaType"]]


def _two_payloads(_: Writer, manifest: dict[str, Any]) -> None:
    manifest["layers"].append(manifest["layers"][-1])


def _swapped_forms(_: Writer, manifest: dict[str, Any]) -> None:
    first, second = manifest["layers"][-2:]
    first["mediaType"], second["mediaType"] = second["mediaType"], first["mediaType"]


def _changed_blob(writer: Writer, manifest: dict[str, Any]) -> None:
    path = writer.blob_path(manifest["layers"][0]["digest"])
    data = bytearray(path.read_bytes())
    path.unlink()
    data[5000] ^= 1
    path.write_bytes(data)


def _other_blob(writer: Writer, manifest: dict[str, Any]) -> None:
    data = bytearray(writer.blob_path(manifest["layers"][0]["digest"]).read_bytes())
    data[5000] ^= 1
    manifest["layers"][0] = writer.add_bytes(bytes(data), BLOB_TYPE)


@pytest.mark.parametrize(
    "change",
    [
        _other_type,
        _cut_size,
        _no_size,
        _no_blob,
        _no_payload,
        _two_payloads,
        _swapped_forms,
        _changed_blob,
        _other_blob,
    ],
)
def test_artifacts_that_break_a_rule_are_refused(
    image: Image, tmp_path: Path, change: Callable[[Writer, dict[str, Any]], None]
) -> None:
    layout = Layout(rewrite(image, tmp_path / "out", change))
    with pytest.raises(FormatError):
        read_artifact(layout, layout.tagged("latest"))
    done = run_check(tmp_path / "out")
    assert done.returncode in (10, 12, 15), done.stdout + done.stderr


def test_layers_of_unknown_types_are_ignored(image: Image, tmp_path: Path) -> None:
    def change(writer: Writer, manifest: dict[str, Any]) -> None:
        manifest["layers"].insert(0, writer.add_bytes(b"later", "application/vnd.erofs-ondemand.later.v1"))

    layout = Layout(rewrite(image, tmp_path / "out", change))
    assert read_artifact(layout, layout.tagged("latest")).blobs
    done = run_check(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
