"""Extended attributes: the body behind an inode, the area that inodes share, and the name filter.

An attribute that several inodes have in common (same name, same value) is stored once in the shared area and named by
its id, the offset there divided by 4.
"""

from __future__ import annotations

from erofs_builder.erofs.layout import (
    XATTR_ENTRY,
    XATTR_FILTER_DEFAULT,
    XATTR_FILTER_SEED,
    XATTR_IBODY_HEADER,
    XATTR_IBODY_HEADER_SIZE,
    XATTR_INDEX_FINGERPRINT,
    XATTR_PREFIXES,
    XATTR_SHARED_MAX,
    XATTR_VALUE_MAX,
)
from erofs_builder.errors import UnsupportedError

Pair = tuple[bytes, bytes]  # full name, value
_ICOUNT_MAX = 0xFFFF
_SHARED_AREA_MAX = 1 << 34  # ids are 32 bits of 4-byte units
_MASK = 0xFFFFFFFF


class XattrTable:
    """Collects the attribute sets of all inodes, then lays out the shared area and each set's body."""

    def __init__(self) -> None:
        self._counts: dict[Pair, int] = {}
        self._sets: dict[tuple[Pair, ...], bytes] = {}
        self._shared: dict[Pair, int] = {}
        self.area = b""

    def add(self, xattrs: dict[bytes, bytes]) -> None:
        """Count one inode's set; UnsupportedError names an attribute that EROFS cannot hold."""
        key = tuple(sorted(xattrs.items()))
        if key not in self._sets:
            for name, value in key:
                _check(name, value)
            self._sets[key] = b""
        for pair in key:
            self._counts[pair] = self._counts.get(pair, 0) + 1

    def layout(self) -> None:
        """Decide what is shared; from here on `body` and `area` are valid."""
        entries = []
        position = 0
        for pair in sorted(pair for pair, count in self._counts.items() if count > 1):
            entry = encode_entry(*pair)
            self._shared[pair] = position >> 2
            entries.append(entry)
            position += len(entry)
        if position > _SHARED_AREA_MAX:
            raise UnsupportedError(f"{position} bytes of shared extended attributes are more than EROFS can address")
        self.area = b"".join(entries)
        for key in self._sets:
            self._sets[key] = self._encode_body(key)

    def body(self, xattrs: dict[bytes, bytes], fingerprint: bytes = b"") -> bytes:
        """The bytes between an inode and its data. A fingerprint that leaves the attributes no room is left out."""
        body = self._sets[tuple(sorted(xattrs.items()))] if xattrs else b""
        if not fingerprint:
            return body
        head = body[:XATTR_IBODY_HEADER_SIZE] or XATTR_IBODY_HEADER.pack(XATTR_FILTER_DEFAULT, 0)
        name_filter, shared = XATTR_IBODY_HEADER.unpack(head)
        head = XATTR_IBODY_HEADER.pack(name_filter & ~(1 << _FINGERPRINT_BIT), shared)
        entry = XATTR_ENTRY.pack(0, XATTR_INDEX_FINGERPRINT, len(fingerprint)) + fingerprint
        whole = head + body[XATTR_IBODY_HEADER_SIZE:] + entry
        return whole if icount(whole) <= _ICOUNT_MAX else body

    def _encode_body(self, key: tuple[Pair, ...]) -> bytes:
        shared = [self._shared[pair] for pair in key if pair in self._shared]
        ids = sorted(shared)[:XATTR_SHARED_MAX]
        inline = [pair for pair in key if pair not in self._shared or self._shared[pair] not in ids]
        name_filter = XATTR_FILTER_DEFAULT
        for name, _ in key:
            name_filter &= ~(1 << filter_bit(name))
        body = b"".join(
            (
                XATTR_IBODY_HEADER.pack(name_filter & _MASK, len(ids)),
                *(id_.to_bytes(4, "little") for id_ in ids),
                *(encode_entry(*pair) for pair in inline),
            )
        )
        if icount(body) > _ICOUNT_MAX:
            raise UnsupportedError(f"{len(body)} bytes of extended attributes on one file are more than EROFS can hold")
        return body


def icount(body: bytes) -> int:
    """i_xattr_icount for a body (0 for none)."""
    return 1 + (len(body) - XATTR_IBODY_HEADER_SIZE) // 4 if body else 0


def split_name(name: bytes) -> tuple[int, bytes]:
    """(prefix index, rest of the name); UnsupportedError for a namespace that EROFS does not have."""
    for index, prefix in XATTR_PREFIXES:
        if name.startswith(prefix):
            suffix = name[len(prefix) :]
            if bool(suffix) == prefix.endswith(b"."):
                return index, suffix
    raise UnsupportedError(f"extended attribute {name.decode(errors='replace')!r}: EROFS has no such namespace")


def encode_entry(name: bytes, value: bytes) -> bytes:
    """One attribute as it lies in a body or in the shared area, padded to 4 bytes."""
    index, suffix = split_name(name)
    length = XATTR_ENTRY.size + len(suffix) + len(value)
    return b"".join((XATTR_ENTRY.pack(len(suffix), index, len(value)), suffix, value, bytes(-length % 4)))


def filter_bit(name: bytes) -> int:
    """The bit that a name clears in the filter, so that lookups of absent names need no search."""
    index, suffix = split_name(name)
    return xxh32(suffix, XATTR_FILTER_SEED + index) & 31


def xxh32(data: bytes, seed: int) -> int:
    """XXH32 (public specification)."""
    prime1, prime2, prime3, prime4, prime5 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
    position, size = 0, len(data)
    if size >= 16:
        lanes = [seed + prime1 + prime2, seed + prime2, seed, seed - prime1]
        while position + 16 <= size:
            for lane in range(4):
                word = int.from_bytes(data[position : position + 4], "little")
                lanes[lane] = _rotate(lanes[lane] + word * prime2, 13) * prime1 & _MASK
                position += 4
        state = sum(_rotate(lane, turn) for lane, turn in zip(lanes, (1, 7, 12, 18), strict=True))
    else:
        state = seed + prime5
    state += size
    while position + 4 <= size:
        word = int.from_bytes(data[position : position + 4], "little")
        state = _rotate(state + word * prime3, 17) * prime4
        position += 4
    for byte in data[position:]:
        state = _rotate(state + byte * prime5, 11) * prime1
    state &= _MASK
    state = (state ^ state >> 15) * prime2 & _MASK
    state = (state ^ state >> 13) * prime3 & _MASK
    return state ^ state >> 16


def _rotate(value: int, bits: int) -> int:
    value &= _MASK
    return (value << bits | value >> (32 - bits)) & _MASK


_FINGERPRINT_BIT = xxh32(b"", XATTR_FILTER_SEED + XATTR_INDEX_FINGERPRINT) & 31


def _check(name: bytes, value: bytes) -> None:
    _, suffix = split_name(name)
    shown = name.decode(errors="replace")
    if len(suffix) > 255 or b"\0" in suffix:
        raise UnsupportedError(f"extended attribute {shown!r}: EROFS cannot hold such a name")
    if len(value) > XATTR_VALUE_MAX:
        raise UnsupportedError(f"extended attribute {shown!r}: {len(value)} bytes are more than EROFS can hold")
