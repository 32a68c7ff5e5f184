"""The hot loops, as Python sees them: the C ones. Their twins, for the property tests, are in tests/."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from erofs_builder._hot import ffi, lib

_TAR_FIELDS = struct.Struct("=11q")
_TAR_RECORD = struct.Struct("=13q")
_TAR_SCAN = 64
_LANES: int = lib.eod_sha256_lanes()


def crc32c_state(state: int, data: bytes | bytearray | memoryview) -> int:
    """Continue a raw CRC-32C (Castagnoli, no inversion): EROFS' superblock checksum starts it at 0xFFFFFFFF."""
    buffer = ffi.from_buffer(data)
    return lib.eod_crc32c(state, buffer, len(buffer))


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The standard CRC-32C of bytes (initial and final inversion)."""
    return crc32c_state(0xFFFFFFFF, data) ^ 0xFFFFFFFF


def parse_tar_header(block: bytes | memoryview) -> tuple[int, tuple[int, ...]]:
    """Status and fields of one 512-byte tar header.

    Status: 0 it is one, 1 all zeros, -1 wrong checksum, -2-i number i malformed. Fields: mode, uid, gid, size, mtime,
    devmajor, devminor, the lengths in use of name, linkname and ustar prefix, and the type byte.
    """
    if len(block) != 512:
        raise ValueError("a tar header has 512 bytes")
    fields = bytearray(_TAR_FIELDS.size)
    status: int = lib.eod_tar_header(ffi.from_buffer(block), ffi.from_buffer("int64_t[]", fields))
    return status, _TAR_FIELDS.unpack(fields)


def scan_tar_headers(data: bytes | memoryview) -> list[tuple[int, ...]]:
    """Up to 64 headers of a part of a tar that begins with one: its offset in `data`, then status and fields as above.

    A header is sought behind the data that the one before it declares; whether it is one, its reader knows.
    """
    records = bytearray(_TAR_RECORD.size * _TAR_SCAN)
    count: int = lib.eod_tar_scan(ffi.from_buffer(data), len(data), ffi.from_buffer("int64_t[]", records), _TAR_SCAN)
    return list(_TAR_RECORD.iter_unpack(memoryview(records)[: count * _TAR_RECORD.size]))


def sha256_many(data: bytes | bytearray | memoryview, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The sha256 of parts of `data`, each (offset, length): several at a time, half as fast again as one by one."""
    view = memoryview(data)
    if any(offset < 0 or length < 0 or offset + length > len(view) for offset, length in places):
        raise ValueError("a part that is not in the data")
    if not _LANES or len(places) < 2:
        return [hashlib.sha256(view[offset : offset + length]).digest() for offset, length in places]
    numbers = array("Q", [number for place in places for number in place])
    digests = bytearray(32 * len(places))
    lib.eod_sha256_many(
        ffi.from_buffer(view), ffi.from_buffer("uint64_t[]", numbers), len(places), ffi.from_buffer(digests)
    )
    return [bytes(digests[at : at + 32]) for at in range(0, len(digests), 32)]


def keep_memory() -> None:
    """Have this process' allocator keep freed memory for the next chunk. For programs that stream, not for daemons."""
    lib.eod_keep_memory()
