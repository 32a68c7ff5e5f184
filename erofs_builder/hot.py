"""The hot loops, as Python sees them: the C ones. Their twins, for the property tests, are in tests/."""

from __future__ import annotations

from erofs_builder._hot import ffi, lib


def crc32c_state(state: int, data: bytes | bytearray | memoryview) -> int:
    """Continue a raw CRC-32C (Castagnoli, no inversion): EROFS' superblock checksum starts it at 0xFFFFFFFF."""
    buffer = ffi.from_buffer(data)
    return lib.eod_crc32c(state, buffer, len(buffer))


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The standard CRC-32C of bytes (initial and final inversion)."""
    return crc32c_state(0xFFFFFFFF, data) ^ 0xFFFFFFFF
