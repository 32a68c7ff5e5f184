"""Targets for layers: compression, tar and everything behind it up to EROFS metadata."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

from erofs_builder import tarstream
from erofs_builder.decompress import CHUNK, plain_chunks
from erofs_builder.erofs.reader import Reader
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.errors import FormatError, TarError, UnsupportedError
from erofs_builder.hot import crc32c, parse_tar_header, scan_tar_headers
from erofs_builder.layer import Options, build_layer, clean_path
from erofs_builder.payload import Form
from erofs_builder.python_imports import MAX_NAME, imports_of
from erofs_builder.tarstream import TarEntry, TarReader
from erofs_builder.tree import flatten, walk
from fuzz.formats import check_extents
from tests.support import twins

ALLOWED = (FormatError,)
_BOMB = 256 << 20  # a single input may decode to this many bytes before a target looks away


def sealed_tar(data: bytes) -> bytes:
    """The data with every block that could be a header given a right checksum, so that mutations get further."""
    blocks = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = blocks[at : at + 512]
        if block[257:262] == b"ustar" or (block[0] and block[156:157] in b"0123456xgLKS"):
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(blocks)


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def _entries(data: bytes, size: int) -> tuple[list[tuple[object, ...]], str]:
    """All entries with their stored bytes, and the error that ended them."""
    found: list[tuple[object, ...]] = []
    reader = TarReader(_pieces(data, size))
    try:
        for entry in reader:
            stored = sum(length for _, length in entry.segments) if entry.segments is not None else entry.size
            body = bytes(reader.read(stored)) if entry.kind == tarstream.REGULAR and stored <= len(data) else b""
            found.append((*_fields(entry), body))
    except (TarError, UnsupportedError) as error:
        return found, str(error)
    return found, ""


def _fields(entry: TarEntry) -> tuple[object, ...]:
    path: object = None
    try:
        path = clean_path(entry.name)
    except FormatError:
        pass
    else:
        assert isinstance(path, bytes) and not path.startswith(b"/")
        assert not {b"", b".", b".."} & set(path.split(b"/")) or not path
    names = (entry.name, entry.link, path, tuple(entry.xattrs.items()), entry.segments)
    return (*names, entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime, entry.mtime_nsec, entry.size, entry.rdev)


def tar(data: bytes) -> None:
    """The tar reader: however the stream is cut, it says the same."""
    for attempt in {data, sealed_tar(data)}:
        whole = _entries(attempt, 1 << 20)
        assert whole[0] == _entries(attempt, 700)[0]


def tar_headers(data: bytes) -> None:
    """The header parser in C against its twin in Python."""
    block = data[:512].ljust(512, b"\0")
    for attempt in (block, sealed_tar(block)):
        status, fields = parse_tar_header(attempt)
        expected, expected_fields = twins.parse_tar_header(attempt)
        assert status == expected
        assert status or fields == expected_fields
    for found, expected_record in zip(scan_tar_headers(data), twins.scan_tar_headers(data), strict=True):
        assert found[: len(expected_record)] == expected_record
    assert crc32c(data[:80]) == twins.crc32c(data[:80])


def imports(data: bytes) -> None:
    """What a Python source imports."""
    found = list(imports_of(data))
    assert all(len(name) <= MAX_NAME for each in found for name in (each.module, *each.names))
    assert sum(len(each.names) + 1 for each in found) <= len(data)


def decompress(data: bytes) -> None:
    """gzip and zstd layers: bounded steps, and for gzip the same bytes as zlib's."""
    total = 0
    checksum = 0
    for chunk in plain_chunks(io.BytesIO(data)):
        assert 0 < len(chunk) <= CHUNK
        total += len(chunk)
        checksum = zlib.crc32(chunk, checksum)
        if total > _BOMB:
            return
    if data[:2] != b"\x1f\x8b" and data[:4] != b"\x28\xb5\x2f\xfd" and data[1:4] != b"\x2a\x4d\x18":
        assert (total, checksum) == (len(data), zlib.crc32(data))


def layer(data: bytes) -> None:
    """A whole layer: tar to blob and tree, both forms of the metadata, and back."""
    blob = io.BytesIO()
    built = build_layer(io.BytesIO(sealed_tar(data)), blob, options=Options(threads=1))
    root = flatten([built, built])
    for form in Form:
        metadata = write_metadata(root, form, [built.blob] if built.blob else [])
        assert len(metadata.erofs) <= _BOMB
        tables = [used.table for used in metadata.blobs if used.table]
        found = dict(walk(Reader(metadata.erofs, tables, form).read_tree()))
        assert found.keys() == {path for path, _ in walk(root)}
        for node in found.values():
            check_extents(node)
