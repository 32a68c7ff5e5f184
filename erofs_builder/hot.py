"""The hot loops, as Python sees them: the C ones. Their twins, for the property tests, are in tests/."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from itertools import chain

from erofs_builder._hot import ffi, lib

_TAR_FIELDS = struct.Struct("=11q")
_TAR_RECORD = struct.Struct("=13q")
_TAR_SCAN = 64
SHA_BLOCK = 64
# FIPS 180-4, 5.3.3: what the C code begins a message with.
_INITIAL = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
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
    view = _checked(data, places)
    if not _LANES or len(places) < 2:
        return [hashlib.sha256(view[offset : offset + length]).digest() for offset, length in places]
    digests = bytearray(32 * len(places))
    lib.eod_sha256_many(
        ffi.from_buffer(view), ffi.from_buffer("uint64_t[]", _flat(places)), len(places), ffi.from_buffer(digests)
    )
    return _split(digests)


class Sha256:
    """The sha256 of a stream that comes in parts, taken in beside digests of other bytes: two for the time of one.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._words = array("I", _INITIAL)
        self._rest = b""  # less than a block
        self._length = 0
        self._plain = None if _LANES else hashlib.sha256()

    def update(self, stream: bytes | bytearray | memoryview) -> None:
        """Take in more of the stream."""
        self.beside(stream, b"", ())

    def beside(
        self,
        stream: bytes | bytearray | memoryview,
        data: bytes | bytearray | memoryview,
        places: Sequence[tuple[int, int]],
    ) -> list[bytes]:
        """Take in more of the stream, and do what `sha256_many` does; best where both are equally long."""
        if self._plain is not None:
            self._plain.update(stream)
            return sha256_many(data, places)
        view = memoryview(stream)
        self._length += len(view)
        if self._rest:
            missing = SHA_BLOCK - len(self._rest)
            self._rest += bytes(view[:missing])
            view = view[missing:]
            if len(self._rest) == SHA_BLOCK:
                self._take(self._words, self._rest)
                self._rest = b""
        whole = len(view) // SHA_BLOCK * SHA_BLOCK
        if whole < len(view):
            self._rest = bytes(view[whole:])
        return self._take(self._words, view[:whole], data, places)

    def digest(self) -> bytes:
        """The sha256 of all so far; more can follow."""
        if self._plain is not None:
            return self._plain.digest()
        words = self._words[:]
        end = self._rest + b"\x80" + bytes(-(len(self._rest) + 9) % SHA_BLOCK) + (8 * self._length).to_bytes(8, "big")
        self._take(words, end)
        return struct.pack(">8I", *words)

    @staticmethod
    def _take(
        words: array[int],
        blocks: bytes | memoryview,
        data: bytes | bytearray | memoryview = b"",
        places: Sequence[tuple[int, int]] = (),
    ) -> list[bytes]:
        view = _checked(data, places)
        digests = bytearray(32 * len(places))
        lib.eod_sha256_beside(
            ffi.from_buffer("uint32_t[]", words),
            ffi.from_buffer(blocks),
            len(blocks) // SHA_BLOCK,
            ffi.from_buffer(view),
            ffi.from_buffer("uint64_t[]", _flat(places)),
            len(places),
            ffi.from_buffer(digests),
        )
        return _split(digests)


def _checked(data: bytes | bytearray | memoryview, places: Sequence[tuple[int, int]]) -> memoryview:
    view = memoryview(data)
    size = len(view)
    for offset, length in places:
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError("a part that is not in the data")
    return view


def _flat(places: Sequence[tuple[int, int]]) -> array[int]:
    return array("Q", chain.from_iterable(places))


def _split(digests: bytearray) -> list[bytes]:
    return [bytes(digests[at : at + 32]) for at in range(0, len(digests), 32)]


def keep_memory() -> None:
    """Have this process' allocator keep freed memory for the next chunk. For programs that stream, not for daemons."""
    lib.eod_keep_memory()
