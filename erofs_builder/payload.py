"""Metadata payload: the one file that a node downloads to mount an image in one form, and mounts as it is.

    0                EROFS metadata of the whole image in one form, zero-padded to 64 KiB
    erofs_size       frame tables, one after the other, in the order of the superblock's device slots
    behind them      hints (hints_codec.py); older payloads have none
    size - 48        trailer: magic 8 b"EROFSMD\\x01", version 2, form 1 (1 encoded, 2 decoded), reserved 1, tables 4,
                     erofs_size 8, tables_size 8, hints_size 8, reserved 4, crc32c 4 over the trailer's first 44 bytes

The payload is zero-padded before the trailer so that its whole size is a multiple of 64 KiB: the kernel may read past
the metadata's end, never past the file's. It lies in the registry as one zstd stream.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import NamedTuple

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.frames import FrameTable
from erofs_builder.hot import crc32c

ALIGNMENT = 65536
MAGIC = b"EROFSMD\x01"
VERSION = 1
# zstd level of a payload in the registry, unless told otherwise.
# On a Debian root of 17,391 inodes: 9 takes 0.05 s for both forms and gives 24 bytes an inode, 18 takes 0.9 s for 21.8.
PAYLOAD_LEVEL = 9
_TRAILER = struct.Struct("<8sHBBIQQQ4sI")


class Form(Enum):
    """How blobs lie in a node's cache."""

    ENCODED = "encoded"  # as in the registry; the kernel decodes (6.10 and later)
    DECODED = "decoded"  # plain bytes; the worker decodes


_FORM_NUMBERS = {Form.ENCODED: 1, Form.DECODED: 2}


class Payload(NamedTuple):
    """A decoded payload's parts: `data` is all of it, and begins with the metadata."""

    form: Form
    data: bytes
    erofs_size: int
    tables: tuple[FrameTable, ...]
    hints: bytes = b""

    @property
    def erofs(self) -> bytes:
        """The EROFS metadata, a copy."""
        return self.data[: self.erofs_size]

    @property
    def erofs_view(self) -> memoryview:
        """The same in place."""
        return memoryview(self.data)[: self.erofs_size]


def encode_payload(form: Form, erofs: bytes, tables: list[FrameTable], hints: bytes = b"") -> bytes:
    """Assemble a payload from padded EROFS metadata, the frame tables in device order, and encoded hints."""
    payload = bytearray(erofs)
    complete_payload(form, payload, tables, hints)
    return bytes(payload)


def complete_payload(form: Form, erofs: bytearray, tables: list[FrameTable], hints: bytes = b"") -> None:
    """Turn padded EROFS metadata into a payload, in place."""
    size = len(erofs)
    if size % ALIGNMENT:
        raise ValueError("EROFS metadata must be padded to 64 KiB")
    encoded = b"".join(table.encode() for table in tables)
    padding = -(len(encoded) + len(hints) + _TRAILER.size) % ALIGNMENT
    sizes = (size, len(encoded), len(hints))
    head = _TRAILER.pack(MAGIC, VERSION, _FORM_NUMBERS[form], 0, len(tables), *sizes, bytes(4), 0)[:-4]
    for part in (encoded, hints, bytes(padding), head, struct.pack("<I", crc32c(head))):
        erofs += part


def decode_payload(data: bytes) -> Payload:
    """Split a payload; ArtifactError or FrameTableError says what is wrong with it."""
    if len(data) < _TRAILER.size or len(data) % ALIGNMENT:
        raise ArtifactError(f"metadata payload: size {len(data)} is not a multiple of {ALIGNMENT}")
    head = data[-_TRAILER.size : -4]
    magic, version, form_number, _, count, erofs_size, tables_size, hints_size, _, checksum = _TRAILER.unpack(
        data[-_TRAILER.size :]
    )
    if magic != MAGIC or version != VERSION:
        raise ArtifactError(f"metadata payload: unknown magic {magic!r} or version {version}")
    if checksum != crc32c(head):
        raise ArtifactError("metadata payload: trailer checksum mismatch")
    form = next((form for form, number in _FORM_NUMBERS.items() if number == form_number), None)
    if form is None or erofs_size % ALIGNMENT or erofs_size + tables_size + hints_size + _TRAILER.size > len(data):
        raise ArtifactError("metadata payload: the trailer's form or sizes are impossible")
    tables: list[FrameTable] = []
    position, end = erofs_size, erofs_size + tables_size
    for _ in range(count):
        if end - position < 16:
            raise ArtifactError("metadata payload: fewer frame tables than the trailer says")
        (frames,) = struct.unpack_from("<I", data, position + 12)
        length = 64 + frames * 36 + 4
        if length > end - position:
            raise ArtifactError("metadata payload: a frame table is cut off")
        tables.append(FrameTable.decode(data[position : position + length]))
        position += length
    if position != end:
        raise ArtifactError("metadata payload: bytes behind the last frame table")
    return Payload(form, data, erofs_size, tuple(tables), data[end : end + hints_size])


def device_tag(form: Form, blob: Digest) -> str:
    """The 64-character device slot tag: the name of the blob's cache object in this form.

    The two forms of one blob are different bytes, so they must never meet under one name in a cachefiles volume.
    """
    if form is Form.ENCODED:
        return blob.hex
    return Digest.of(b"erofs-ondemand decoded\n" + blob.raw).hex
