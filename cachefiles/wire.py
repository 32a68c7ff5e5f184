"""The bytes of /dev/cachefiles in on-demand mode: one message per read(2). Pure; native byte order.

    header   u32 msg_id, u32 opcode, u32 len (of the whole message), u32 object_id
    OPEN     u32 volume_key_size (with its NUL), u32 cookie_key_size, u32 fd, u32 flags, volume key, cookie key
    READ     u64 off, u64 len
    CLOSE    nothing

tests/test_abi.py holds these against the kernel's own headers.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct("=IIII")
OPEN = struct.Struct("=IIII")
READ = struct.Struct("=QQ")
MSG_MAX_SIZE = 1024
OP_OPEN, OP_CLOSE, OP_READ = range(3)


class Open(NamedTuple):
    """The kernel opens an object: answer copen. `fd` is write-only and not close-on-exec."""

    msg_id: int
    object_id: int
    fd: int
    volume: bytes  # "erofs,<domain_id or fsid>", without its NUL
    cookie: bytes


class Close(NamedTuple):
    """The kernel is done with an object: close its descriptor. No answer."""

    msg_id: int
    object_id: int


class Read(NamedTuple):
    """Bytes are missing: write them, then READ_COMPLETE."""

    msg_id: int
    object_id: int
    offset: int
    length: int


Message = Open | Close | Read


def parse_message(data: bytes) -> Message:
    """One message; ValueError when it is malformed."""
    if len(data) < HEADER.size:
        raise ValueError(f"cachefiles: message of {len(data)} bytes, expected at least {HEADER.size}")
    msg_id, opcode, length, object_id = HEADER.unpack_from(data)
    if length != len(data):
        raise ValueError(f"cachefiles: message says {length} bytes, read {len(data)}")
    payload = data[HEADER.size :]
    if opcode == OP_READ:
        if len(payload) != READ.size:
            raise ValueError(f"cachefiles: READ with {len(payload)} bytes of payload, expected {READ.size}")
        return Read(msg_id, object_id, *READ.unpack(payload))
    if opcode == OP_CLOSE:
        return Close(msg_id, object_id)
    if opcode == OP_OPEN:
        return _parse_open(msg_id, object_id, payload)
    raise ValueError(f"cachefiles: unknown opcode {opcode}")


def _parse_open(msg_id: int, object_id: int, payload: bytes) -> Open:
    if len(payload) < OPEN.size:
        raise ValueError(f"cachefiles: OPEN with {len(payload)} bytes of payload, expected at least {OPEN.size}")
    volume_size, cookie_size, fd, _ = OPEN.unpack_from(payload)
    keys = payload[OPEN.size :]
    if fd >= 1 << 31:
        raise ValueError(f"cachefiles: OPEN with descriptor {fd}")
    if volume_size + cookie_size != len(keys) or volume_size < 1 or keys[volume_size - 1] != 0:
        raise ValueError(f"cachefiles: OPEN with keys of {volume_size} and {cookie_size} bytes in {len(keys)}")
    return Open(msg_id, object_id, fd, keys[: volume_size - 1], keys[volume_size:])
