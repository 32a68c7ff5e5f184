"""Python twins of the C loops of erofs_builder/csrc, written from the same descriptions, for the property tests."""

from __future__ import annotations

_NUMBERS = ((100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8))


def _number(field: bytes) -> int | None:
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = len(field) * 8
        value = value - (1 << bits) if field[0] & 0x40 else value & ((1 << bits - 1) - 1)
        return value if -(1 << 63) <= value < 1 << 63 else None
    text = field.lstrip(b" ")
    digits = len(text) - len(text.lstrip(b"01234567"))
    if text[digits:].strip(b" \0"):
        return None
    return int(text[:digits] or b"0", 8)


def _used(field: bytes) -> int:
    return len(field.split(b"\0", 1)[0])


def parse_tar_header(block: bytes) -> tuple[int, tuple[int, ...] | None]:
    """The twin of eod_tar_header: status, and the fields when it is 0."""
    if not any(block):
        return 1, None
    rest = block[:148] + b" " * 8 + block[156:]
    sums = sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)
    if _number(block[148:156]) not in sums:
        return -1, None
    ustar = block[257:263] == b"ustar\0"
    with_devices = ustar or block[257:263] == b"ustar "
    numbers = []
    for index, (offset, length) in enumerate(_NUMBERS):
        number = _number(block[offset : offset + length]) if index < 5 or with_devices else 0
        if number is None:
            return -2 - index, None
        numbers.append(number)
    prefix = block[345 : 345 + (131 if block[508:511] == b"tar" else 155)] if ustar else b""
    return 0, (*numbers, _used(block[:100]), _used(block[157:257]), _used(prefix), block[156])


def scan_tar_headers(data: bytes) -> list[tuple[int, ...]]:
    """The twin of eod_tar_scan: up to 64 records of offset, status and fields (all zeros where there are none)."""
    found: list[tuple[int, ...]] = []
    at = 0
    while len(found) < 64 and len(data) - at >= 512:
        status, fields = parse_tar_header(data[at : at + 512])
        if fields is None:
            found.append((at, status))
            return found
        found.append((at, status, *fields))
        size = fields[3] if fields[10] in b"\x0007xgLKSD" else 0
        if not 0 <= size <= len(data):
            return found
        at += 512 + -(-size // 512) * 512
    return found


def crc32c(data: bytes) -> int:
    """The twin of eod_crc32c with both inversions: bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF
