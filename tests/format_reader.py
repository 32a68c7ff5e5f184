"""A second reader of the artifact format, written from docs/format.md alone: containers, frames, payloads, artifact.

It shares nothing with the builder or the loader: a rule that both sides read alike from the page is a rule that the
page states. `tests/format_tree.py` continues with the EROFS metadata.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import zstandard

BLOCK = 4096
ALIGN = 65536
MAX_FRAME_BLOCKS = 256
MAX_CONTENT_BLOCKS = 2047
WINDOW = 1 << 20
ENCODED, DECODED = 1, 2
FORMS = {ENCODED: "encoded", DECODED: "decoded"}
PREFIX = "application/vnd.erofs-ondemand."
ARTIFACT_TYPE = PREFIX + "image.v1+json"
BLOB_TYPE = PREFIX + "blob.v1+zstd"
CONTENTS_TYPE = PREFIX + "contents.v1+zstd"
PAYLOAD_TYPES = {form: f"{PREFIX}metadata.{name}.v1+zstd" for form, name in FORMS.items()}
MAX_EMBEDDED = 8192  # bytes of a payload that its descriptor brings along
PAYLOAD_SIZE = "org.erofs-ondemand.payload-size"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
# The page bounds no decompressed size but the one that the manifest states; a reader has to.
MAX_DECOMPRESSED = 1 << 30


class FormatError(Exception):
    """A rule of the page is broken."""


def require(condition: bool, rule: str) -> None:
    """Raise FormatError(rule) unless `condition` holds."""
    if not condition:
        raise FormatError(rule)


def take(data: bytes, offset: int, size: int, what: str) -> bytes:
    """`size` bytes of `data` at `offset`, or FormatError."""
    require(offset >= 0 and offset + size <= len(data), f"{what} reaches behind the end")
    return data[offset : offset + size]


def is_zero(data: bytes) -> bool:
    """Whether there is nothing but zeros in `data`."""
    return data == bytes(len(data))


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """The standard CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def check_crc(data: bytes, what: str) -> None:
    """The last four bytes are the CRC-32C of all before."""
    require(len(data) >= 4 and crc32c(data[:-4]) == struct.unpack("<I", data[-4:])[0], f"{what}: CRC-32C")


def check_magic(data: bytes, magic: bytes, what: str) -> None:
    """The magic of eight bytes, and version 1 as le16 behind it."""
    require(data[:8] == magic, f"{what}: magic")
    require(data[8:10] == b"\1\0", f"{what}: version")


# Frames


@dataclass(frozen=True)
class ZstdHeader:
    """What the header of a zstd frame states (RFC 8878, 3.1.1)."""

    size: int
    content: int | None
    window: int
    checksum: bool


def parse_zstd_header(data: bytes) -> ZstdHeader:
    """Parse the frame header at the start of `data`."""
    require(data[:4] == b"\x28\xb5\x2f\xfd" and len(data) >= 18, "no zstd frame")
    descriptor, position, window = data[4], 5, 0
    require(descriptor & 0x08 == 0, "zstd: reserved bit")
    single = bool(descriptor & 0x20)
    if not single:
        window = 1 << 10 + (data[5] >> 3)
        window += (window >> 3) * (data[5] & 7)
        position += 1
    require(descriptor & 3 == 0, "zstd: dictionary")
    width = {0: 1 if single else 0, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    content = int.from_bytes(data[position : position + width], "little") if width else None
    if content is not None:
        content += 256 if width == 2 else 0
        window = content if single else window
    return ZstdHeader(position + width, content, window, bool(descriptor & 0x04))


def zstd_frame_end(data: bytes) -> tuple[ZstdHeader, int]:
    """The header and the size of the zstd frame at the start of `data`, found by walking its blocks."""
    header = parse_zstd_header(data)
    position, last = header.size, False
    while not last:
        word = int.from_bytes(take(data, position, 3, "zstd block"), "little")
        last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
        require(kind != 3, "zstd: reserved block type")
        position += 3 + (1 if kind == 1 else size)
    position += 4 if header.checksum else 0
    require(position <= len(data), "zstd frame reaches behind the end")
    return header, position


def decode_frame(data: bytes, content_blocks: int) -> bytes:
    """Check one frame's blocks `data` against section 1 and return its content."""
    require(len(data) % BLOCK == 0 and 1 <= len(data) // BLOCK <= MAX_FRAME_BLOCKS, "frame: whole blocks, 1 to 256")
    header, end = zstd_frame_end(data)
    require(header.content is not None, "frame: content size not stated")
    require(header.checksum, "frame: no content checksum")
    require(header.window <= WINDOW, "frame: window above 1 MiB")
    require(header.content == content_blocks * BLOCK, "frame: content size differs from the table")
    gap = -end % BLOCK
    padding = gap + BLOCK if 0 < gap < 8 else gap
    require(end + padding == len(data), "frame: more blocks than it needs")
    if padding:
        magic, length = struct.unpack("<II", data[end : end + 8])
        require(magic == 0x184D2A50 and length == padding - 8, "frame: skippable padding")
        require(is_zero(data[end + 8 :]), "frame: padding not zero")
    try:
        return bytes(zstandard.ZstdDecompressor().decompress(data[:end], max_output_size=content_blocks * BLOCK))
    except zstandard.ZstdError as error:
        raise FormatError(f"frame: {error}") from error


# Frame table


@dataclass(frozen=True)
class FrameTable:
    """Section 2. `starts` and `positions` are the frames' first blocks in the blob and in the decoded blob."""

    size: int
    decoded_size: int
    digest: bytes
    blocks: tuple[int, ...]
    content_blocks: tuple[int, ...]
    digests: tuple[bytes, ...]
    starts: dict[int, int]
    positions: tuple[int, ...]


def parse_frame_table(data: bytes) -> tuple[FrameTable, int]:
    """Parse the table at the start of `data`; returns it and its size."""
    head = take(data, 0, 64, "frame table")
    check_magic(head, b"EROFSFT\1", "frame table")
    digest_length, count, size, decoded_size = struct.unpack("<HIQQ", head[10:32])
    require(digest_length == 32, "frame table: digest length")
    require(count <= 1 << 26, "frame table: number of frames")
    whole = take(data, 0, 68 + 36 * count, "frame table")
    check_crc(whole, "frame table")
    blocks = struct.unpack_from(f"<{count}H", whole, 64)
    content = struct.unpack_from(f"<{count}H", whole, 64 + 2 * count)
    require(all(1 <= each <= MAX_FRAME_BLOCKS for each in blocks), "frame table: blocks of a frame")
    require(all(1 <= each <= MAX_CONTENT_BLOCKS for each in content), "frame table: blocks of a content")
    require(sum(blocks) * BLOCK == size, "frame table: size of the blob")
    require(sum(content) * BLOCK == decoded_size, "frame table: size of the decoded blob")
    digests = tuple(whole[64 + 4 * count + 32 * i :][:32] for i in range(count))
    starts, positions = _sums(blocks), _sums(content)
    table = FrameTable(
        size, decoded_size, head[32:64], blocks, content, digests, {b: i for i, b in enumerate(starts)}, positions
    )
    return table, len(whole)


def _sums(counts: tuple[int, ...]) -> tuple[int, ...]:
    total, sums = 0, []
    for count in counts:
        sums.append(total)
        total += count
    return tuple(sums)


class Blob:
    """A data blob behind its frame table: frames are verified before they are decoded."""

    def __init__(self, data: bytes, table: FrameTable) -> None:
        require(len(data) == table.size, "blob: size differs from its table")
        require(hashlib.sha256(data).digest() == table.digest, "blob: digest differs from its table")
        self.table = table
        self._data = data
        self.content = lru_cache(8)(self._content)

    def _content(self, frame: int) -> bytes:
        require(0 <= frame < len(self.table.blocks), "blob: no such frame")
        start = sum(self.table.blocks[:frame]) * BLOCK
        data = self._data[start : start + self.table.blocks[frame] * BLOCK]
        require(hashlib.sha256(data).digest() == self.table.digests[frame], "frame: digest differs from the table")
        return decode_frame(data, self.table.content_blocks[frame])

    def check(self) -> None:
        """Decode every frame, and the blob as the one zstd stream that it also is."""
        whole = hashlib.sha256()
        for frame in range(len(self.table.blocks)):
            whole.update(self.content(frame))
        stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(self._data), read_across_frames=True)
        plain = hashlib.sha256()
        while piece := stream.read(1 << 20):
            plain.update(piece)
        require(plain.digest() == whole.digest(), "blob: as a stream it is something else")


# Metadata payload


@dataclass(frozen=True)
class Payload:
    """Section 3: EROFS metadata, the frame tables in the order of the device slots, and hints about their blobs."""

    form: int
    erofs: bytes
    tables: tuple[FrameTable, ...]
    hints: tuple[BlobHints, ...] = ()


@dataclass(frozen=True)
class BlobHints:
    """Section 3.1: groups as first frame and number of frames, packages as frames, companions by frame."""

    groups: tuple[tuple[int, int], ...]
    packages: tuple[tuple[int, ...], ...]
    companions: dict[int, tuple[int, ...]]


def parse_hints(data: bytes, frames: list[int]) -> tuple[BlobHints, ...]:
    """Of blobs with so many frames each."""
    numbers, value, shift = [], 0, 0
    for byte in data[1:]:
        value += (byte % 128) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    require(data[0] == 1 and shift == 0 and all(number < 1 << 32 for number in numbers), "hints: version or numbers")
    require(len(data) <= 1 + sum(3 + 16 * count for count in frames), "hints: too large")
    stream = iter(numbers)
    try:
        blobs = [_parse_blob_hints(stream, count) for count in frames]
    except StopIteration:
        raise FormatError("hints: cut off") from None
    require(next(stream, None) is None, "hints: more than there are blobs")
    return tuple(blobs)


def _take(stream: Iterator[int]) -> list[int]:
    """A number, and so many behind it."""
    found = []
    for _ in range(next(stream)):
        found.append(next(stream))
    return found


def _parse_blob_hints(stream: Iterator[int], frames: int) -> BlobHints:
    groups, packages, companions, first, frame = [], [], {}, 0, 0
    for _ in range(next(stream)):
        first += next(stream)
        groups.append((first, next(stream)))
    for _ in range(next(stream)):
        packages.append(tuple(itertools.accumulate(_take(stream))))
    for _ in range(next(stream)):
        frame += next(stream)
        coded = _take(stream)
        require(frame not in companions, "hints: not sorted")
        companions[frame] = tuple(frame + (code // 2 if code % 2 == 0 else -(code + 1) // 2) for code in coded)
    named = [last for first, count in groups for last in (first, first + count - 1)]
    named += [each for package in packages for each in package]
    named += [each for frame, others in companions.items() for each in (frame, *others)]
    require(all(0 <= each < frames for each in named), "hints: a frame that the blob does not have")
    require(groups == sorted(set(groups)) and packages == sorted(set(packages)), "hints: not sorted")
    require(all(list(package) == sorted(set(package)) for package in packages), "hints: a package is not sorted")
    require(all(count > 1 for _, count in groups), "hints: a group of one frame")
    require(sum(count for _, count in groups) <= 4 * frames, "hints: too many groups")
    require(all(2 <= len(package) <= 16 for package in packages), "hints: a package of too few or too many frames")
    members = [each for package in packages for each in package]
    require(all(members.count(each) <= 32 for each in set(members)), "hints: a frame in too many packages")
    require(all(len(others) <= 3 for others in companions.values()), "hints: too many companions")
    return BlobHints(tuple(groups), tuple(packages), companions)


def parse_payload(data: bytes) -> Payload:
    """Check and split a decompressed payload."""
    require(len(data) % ALIGN == 0 and len(data) > 0, "payload: not a multiple of 64 KiB")
    trailer = data[-48:]
    check_crc(trailer, "trailer")
    check_magic(trailer, b"EROFSMD\1", "trailer")
    form, zero, count, erofs_size, tables_size, hints_size = struct.unpack("<BBIQQQ", trailer[10:40])
    require(form in FORMS and zero == 0 and is_zero(trailer[40:44]), "trailer: form or reserved bytes")
    require(erofs_size > 0 and erofs_size % ALIGN == 0, "trailer: size of the metadata")
    end = erofs_size + tables_size
    require(len(data) == -(-(end + hints_size + 48) // ALIGN) * ALIGN, "trailer: sizes do not add up")
    require(is_zero(data[end + hints_size : -48]), "payload: padding not zero")
    region, tables, position = data[erofs_size:end], [], 0
    for _ in range(count):
        table, size = parse_frame_table(region[position:])
        tables.append(table)
        position += size
    require(position == tables_size, "trailer: size of the frame tables")
    hints = data[end : end + hints_size]
    found = parse_hints(hints, [len(table.blocks) for table in tables]) if hints else ()
    return Payload(form, data[:erofs_size], tuple(tables), found)


def decompress(data: bytes, limit: int) -> bytes:
    """Decompress one zstd stream of at most `limit` bytes of content."""
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
        pieces = bytearray()
        while piece := reader.read(min(1 << 20, limit + 1 - len(pieces))):
            pieces += piece
            require(len(pieces) <= limit, "stream is longer than stated")
    except zstandard.ZstdError as error:
        raise FormatError(f"stream: {error}") from error
    return bytes(pieces)


# Content index


@dataclass(frozen=True)
class Piece:
    """A piece of content: `length` bytes at `block` of the content of `frame`."""

    frame: int
    length: int
    block: int
    digest: bytes


def parse_contents(data: bytes) -> list[tuple[bytes, list[Piece]]]:
    """Section 6: per blob, its digest and its pieces."""
    check_crc(data, "content index")
    check_magic(data, b"EROFSCI\1", "content index")
    zero, count = struct.unpack("<HI", take(data, 10, 6, "content index"))
    require(zero == 0, "content index: reserved bytes")
    position, blobs = 16, []
    for _ in range(count):
        digest = take(data, position, 32, "content index")
        (number,) = struct.unpack("<I", take(data, position + 32, 4, "content index"))
        body = take(data, position + 36, 42 * number, "content index")
        frames, lengths = struct.unpack_from(f"<{number}I", body), struct.unpack_from(f"<{number}I", body, 4 * number)
        blocks = struct.unpack_from(f"<{number}H", body, 8 * number)
        digests = (body[10 * number + 32 * i :][:32] for i in range(number))
        blobs.append((digest, [Piece(*row) for row in zip(frames, lengths, blocks, digests, strict=True)]))
        position += 36 + 42 * number
    require(position + 4 == len(data), "content index: size")
    return blobs


def check_contents(index: list[tuple[bytes, list[Piece]]], blobs: dict[bytes, Blob]) -> int:
    """Check every piece against the blobs; returns the number of pieces."""
    total = 0
    for digest, pieces in index:
        require(digest in blobs, "content index: a blob that the artifact does not name")
        for piece in pieces:
            content = blobs[digest].content(piece.frame)
            data = take(content, piece.block * BLOCK, piece.length, "content index: piece")
            require(hashlib.sha256(data).digest() == piece.digest, "content index: piece differs from the blob")
        total += len(pieces)
    return total


# Artifact


@dataclass
class Artifact:
    """Section 5, all its blobs read and verified."""

    subject: str | None
    blobs: list[Blob] = field(default_factory=list)
    payloads: dict[int, Payload] = field(default_factory=dict)
    contents: list[tuple[bytes, list[Piece]]] | None = None


class Layout:
    """An OCI layout directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.index: dict[str, Any] = json.loads((path / "index.json").read_bytes())

    def read(self, descriptor: dict[str, Any]) -> bytes:
        """The blob that a descriptor names, verified against its digest and size."""
        algorithm, _, digest = descriptor["digest"].partition(":")
        require(algorithm == "sha256", "descriptor: digest algorithm")
        data: bytes = (self._path / "blobs" / "sha256" / digest).read_bytes()
        require(len(data) == descriptor["size"], "descriptor: size")
        require(hashlib.sha256(data).hexdigest() == digest, "descriptor: digest")
        return data

    def tagged(self, tag: str) -> dict[str, Any]:
        """The descriptor that the layout's index lists under `tag`."""
        for each in self.index["manifests"]:
            if each.get("annotations", {}).get(REF_NAME) == tag:
                return dict(each)
        raise FormatError(f"no tag {tag}")

    def manifest(self, tag: str) -> dict[str, Any]:
        """The manifest that `tag` names."""
        return dict(json.loads(self.read(self.tagged(tag))))

    def referrers(self, digest: str) -> Iterator[dict[str, Any]]:
        """The artifacts that the layout's index lists for the source image `digest`."""
        for each in self.index["manifests"]:
            if each.get("artifactType") != ARTIFACT_TYPE:
                continue
            if json.loads(self.read(each)).get("subject", {}).get("digest") == digest:
                yield each


def read_artifact(layout: Layout, descriptor: dict[str, Any]) -> Artifact:
    """Read an artifact from a layout; every rule of sections 1 to 3, 5 and 6 is checked."""
    manifest = json.loads(layout.read(descriptor))
    require(manifest.get("schemaVersion") == 2 and manifest.get("mediaType") == MANIFEST_TYPE, "artifact: manifest")
    require(manifest.get("artifactType") == ARTIFACT_TYPE, "artifact: artifactType")
    require(manifest["config"]["mediaType"] == EMPTY_TYPE, "artifact: config")
    require(layout.read(manifest["config"]) == b"{}", "artifact: config")
    artifact = Artifact(manifest.get("subject", {}).get("digest"))
    data = [layout.read(each) for each in manifest["layers"] if each["mediaType"] == BLOB_TYPE]
    for form, media_type in PAYLOAD_TYPES.items():
        found = [each for each in manifest["layers"] if each["mediaType"] == media_type]
        require(len(found) <= 1, "artifact: two payloads of one form")
        if found:
            artifact.payloads[form] = _read_payload(layout, found[0], form)
    require(bool(artifact.payloads), "artifact: no payload")
    for payload in artifact.payloads.values():
        require(len(payload.tables) == len(data), "artifact: data blobs and frame tables")
        artifact.blobs = [Blob(*pair) for pair in zip(data, payload.tables, strict=True)]
    for each in manifest["layers"]:
        if each["mediaType"] == CONTENTS_TYPE:
            require(artifact.contents is None, "artifact: two content indexes")
            artifact.contents = parse_contents(decompress(layout.read(each), MAX_DECOMPRESSED))
    return artifact


def _read_payload(layout: Layout, descriptor: dict[str, Any], form: int) -> Payload:
    if "data" in descriptor:
        require(descriptor["size"] <= MAX_EMBEDDED, "artifact: data of a payload that is not small")
        require(base64.b64decode(descriptor["data"]) == layout.read(descriptor), "artifact: data is not the payload")
    stated = descriptor.get("annotations", {}).get(PAYLOAD_SIZE, "")
    require(stated.isascii() and stated.isdecimal(), "artifact: payload-size")
    data = decompress(layout.read(descriptor), min(int(stated), MAX_DECOMPRESSED))
    require(len(data) == int(stated), "artifact: payload-size differs from the payload")
    payload = parse_payload(data)
    require(payload.form == form, "artifact: the payload is of another form")
    return payload
