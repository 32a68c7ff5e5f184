"""The bytes of fanotify: events as read(2) gives them, responses as write(2) takes them. Pure; native byte order.

    struct fanotify_event_metadata   u32 event_len, u8 vers (3), u8, u16 metadata_len, u64 mask, s32 fd, s32 pid
    info records behind it           u8 type, u8, u16 len, …; type 6 (RANGE, 6.14): u32, u64 offset, u64 count
    struct fanotify_response         s32 fd, u32 FAN_ALLOW 1 | FAN_DENY 2 | errno << 24

tests/test_abi.py holds these against the kernel's own headers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

METADATA = struct.Struct("=IBBHQii")
INFO_HEADER = struct.Struct("=BBH")
INFO_RANGE = struct.Struct("=BBHIQQ")
RESPONSE = struct.Struct("=iI")
_ALONE = struct.Struct("=IBBHQiiBBHIQQ")  # an event with its range record
_ALONE_SIZES = (_ALONE.size, METADATA.size, INFO_RANGE.size)
METADATA_VERSION = 3
INFO_TYPE_RANGE = 6
ALLOW = 1
DENY = 2
ERRNO_SHIFT = 24


class Event(NamedTuple):
    """An event. `fd` is negative where the kernel could not make one (it has denied the access itself then).

    `pid` is the thread that waits, 0 if our PID namespace has no number for it.
    `offset` and `length` are None when the kernel gave no range: the whole file is meant. Length 0 is a truncation.
    """

    mask: int
    fd: int
    pid: int
    offset: int | None
    length: int | None


def parse_events(data: bytes) -> Iterator[Event]:
    """The events in what one read(2) of a group gave; ValueError when it is malformed."""
    position = 0
    if len(data) == _ALONE.size:  # mostly: one event, of this very shape
        length, version, _, metadata_length, mask, fd, pid, kind, _, info, _, offset, count = _ALONE.unpack(data)
        sizes = (length, metadata_length, info)
        if version == METADATA_VERSION and kind == INFO_TYPE_RANGE and sizes == _ALONE_SIZES:
            yield Event(mask, fd, pid, offset, count)
            return
    while position < len(data):
        if len(data) - position < METADATA.size:
            raise ValueError(f"fanotify: {len(data) - position} bytes left, an event has at least {METADATA.size}")
        length, version, _, metadata_length, mask, fd, pid = METADATA.unpack_from(data, position)
        if version != METADATA_VERSION:
            raise ValueError(f"fanotify: event version {version}, expected {METADATA_VERSION}")
        if not METADATA.size <= metadata_length <= length <= len(data) - position:
            raise ValueError(f"fanotify: event of {length} bytes, {metadata_length} of metadata, {len(data)} read")
        yield Event(mask, fd, pid, *_range(data, position + metadata_length, position + length))
        position += length


def _range(data: bytes, position: int, end: int) -> tuple[int | None, int | None]:
    """Offset and count of the range record among an event's info records."""
    while position < end:
        if end - position < INFO_HEADER.size:
            raise ValueError("fanotify: an info record is cut off")
        kind, _, length = INFO_HEADER.unpack_from(data, position)
        if not INFO_HEADER.size <= length <= end - position:
            raise ValueError(f"fanotify: info record of {length} bytes in an event with {end - position} left")
        if kind == INFO_TYPE_RANGE:
            if length < INFO_RANGE.size:
                raise ValueError(f"fanotify: range record of {length} bytes, expected {INFO_RANGE.size}")
            _, _, _, _, offset, count = INFO_RANGE.unpack_from(data, position)
            return offset, count
        position += length
    return None, None


def pack_response(fd: int, errno: int) -> bytes:
    """The answer to the event of `fd`: allow when `errno` is 0, else deny with it."""
    return RESPONSE.pack(fd, DENY | errno << ERRNO_SHIFT if errno else ALLOW)
