"""Where the members of a tar file lie, found by its headers alone: archives of images are large and never read through.

Semantics are those of erofs_builder.tarstream, as far as archives of images need them: no sparse members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from erofs_builder import pax
from erofs_builder.errors import TarError
from erofs_builder.hot import parse_tar_header

BLOCK = 512
REGULAR, HARD_LINK, SYMLINK = b"012"
_KINDS = {0: REGULAR, ord("7"): REGULAR}
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"xgLK"
_MAX_EXTENSION = 1 << 20
_LARGEST = (1 << 63) - 2 * BLOCK  # what lies behind it has an offset too
_MAX_HEADERS = 400_000  # extension headers among them

ReadAt = Callable[[int, int], bytes]  # (length, offset): fewer bytes only at the end


class Member(NamedTuple):
    """A member; `kind` is REGULAR, HARD_LINK, SYMLINK or another type byte. `offset` is that of its data."""

    name: bytes
    kind: int
    link: bytes
    offset: int
    size: int


def scan(read_at: ReadAt) -> Iterator[Member]:
    """All members in order; TarError where the file is none, or is cut off within a header."""
    at = 0
    name = link = size = None
    for _ in range(_MAX_HEADERS):
        block = read_at(BLOCK, at)
        if not block:
            return
        if len(block) < BLOCK:
            raise TarError(f"cut off in the header at offset {at}")
        status, fields = parse_tar_header(block)
        if status == 1:
            return
        if status:
            raise TarError(f"no tar header at offset {at}")
        kind = _KINDS.get(fields[10], fields[10])
        at += BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            data = _extension(read_at, at, fields[3])
            at += _padded(fields[3])
            if kind == _PAX:
                records = dict(pax.parse_records(data))
                name, link = records.get(b"path") or name, records.get(b"linkpath") or link
                size = pax.parse_size(b"size", records[b"size"]) if records.get(b"size") else size
            elif kind == _LONG_NAME:
                name = data.split(b"\0", 1)[0]
            elif kind == _LONG_LINK:
                link = data.split(b"\0", 1)[0]
            continue
        stored = fields[3] if size is None else size
        stored = stored if kind not in (HARD_LINK, SYMLINK) else 0
        if stored < 0:
            raise TarError(f"negative size in the header at offset {at - BLOCK}")
        if stored > _LARGEST - at:
            raise TarError(f"a size of {stored} in the header at offset {at - BLOCK}")
        own_link = block[157 : 157 + fields[8]]
        yield Member(_own_name(block, fields) if name is None else name, kind, link or own_link, at, stored)
        name = link = size = None
        at += _padded(stored)
    raise TarError(f"more than {_MAX_HEADERS} headers")


def _extension(read_at: ReadAt, at: int, size: int) -> bytes:
    if not 0 <= size <= _MAX_EXTENSION:
        raise TarError(f"extension header of {size} bytes at offset {at}")
    data = read_at(size, at)
    if len(data) < size:
        raise TarError(f"cut off in the extension header at offset {at}")
    return data


def _own_name(block: bytes, fields: tuple[int, ...]) -> bytes:
    name = block[: fields[7]]
    return block[345 : 345 + fields[9]] + b"/" + name if fields[9] else name


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
