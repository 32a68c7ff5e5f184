"""PAX extended headers: records, xattrs, times and the sparse maps that GNU tar hides in them."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from erofs_builder.errors import TarError

Records = list[tuple[bytes, bytes]]
Segments = tuple[tuple[int, int], ...]  # (offset in the file, length): where a sparse file has data

# What no real archive needs more of; a hostile one must not make us allocate it.
MAX_SEGMENTS = 1 << 20
_MAX_SIZE = (1 << 63) - 1
_DECIMAL = re.compile(rb"-?[0-9]{1,30}\Z")
_TIME = re.compile(rb"(-?)([0-9]{1,30})(?:\.([0-9]*))?\Z")
_SCHILY_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."


def parse_records(data: bytes) -> Records:
    """The records of one extended header in order; TarError if one is malformed."""
    records: Records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            if not data[at:].strip(b"\0"):
                break  # some writers pad the header itself with NULs
            raise TarError(f"PAX record at {at} of its header has no length: {data[at : at + 20]!r}")
        end = at + int(digits)
        equals = data.find(b"=", space, end)
        if end > len(data) or end <= space + 1 or data[end - 1] != 0x0A or equals < 0:
            raise TarError(f"malformed PAX record at {at} of its header: {data[at : at + 40]!r}")
        records.append((data[space + 1 : equals], data[equals + 1 : end - 1]))
        at = end
    return records


def parse_integer(key: bytes, value: bytes) -> int:
    """A decimal number, possibly negative."""
    if not _DECIMAL.match(value):
        raise TarError(f"PAX {key.decode(errors='replace')} is not a number: {value[:40]!r}")
    return int(value)


def parse_size(key: bytes, value: bytes) -> int:
    """A decimal number from 0 to 2^63-1."""
    number = parse_integer(key, value)
    if not 0 <= number <= _MAX_SIZE:
        raise TarError(f"PAX {key.decode(errors='replace')} is out of range: {number}")
    return number


def parse_time(key: bytes, value: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds (0 to 999,999,999), rounded down."""
    match = _TIME.match(value)
    if not match:
        raise TarError(f"PAX {key.decode(errors='replace')} is not a time: {value[:40]!r}")
    seconds, fraction = int(match[2]), match[3] or b""
    nanoseconds = int(fraction[:9].ljust(9, b"0"))
    if match[1]:
        if fraction[9:].strip(b"0"):
            nanoseconds += 1
        seconds, nanoseconds = divmod(-(seconds * 1_000_000_000 + nanoseconds), 1_000_000_000)
    if not -(1 << 63) <= seconds < 1 << 63:
        raise TarError(f"PAX {key.decode(errors='replace')} is out of range: {value[:40]!r}")
    return seconds, nanoseconds


def parse_xattr(key: bytes, value: bytes) -> tuple[bytes, bytes] | None:
    """The xattr that a record carries (full name, value), or None if it carries none."""
    if key.startswith(_SCHILY_XATTR):
        return key[len(_SCHILY_XATTR) :], value
    if key.startswith(_LIBARCHIVE_XATTR):
        name = unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
        try:
            return name, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
        except binascii.Error as error:
            raise TarError(f"PAX {key.decode(errors='replace')} is not base64: {error}") from None
    return None


def check_segments(segments: list[tuple[int, int]], size: int, stored: int) -> Segments:
    """A sparse map in order, without empty segments; TarError unless it fits the file and the stored bytes."""
    position = total = 0
    for offset, length in segments:
        if offset < position or length < 0 or offset + length > size:
            raise TarError(f"sparse map: segment {offset}+{length} overlaps or lies outside a file of {size} bytes")
        position = offset + length
        total += length
    if total != stored:
        raise TarError(f"sparse map: holds {total} bytes, the archive {stored}")
    return tuple(segment for segment in segments if segment[1])


def pairs(numbers: list[bytes]) -> list[tuple[int, int]]:
    """offset, length, offset, length, … as the sparse formats 0.0, 0.1 and 1.0 write them."""
    if len(numbers) % 2:
        raise TarError("sparse map: an odd count of numbers")
    values = [parse_size(b"GNU.sparse.map", number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))
