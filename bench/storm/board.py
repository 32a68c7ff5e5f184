"""What readers report, in memory that they share with the storm: one row of numbers a reader; for all of them a flag
and how many kills there were.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

METHODS = ("read", "mmap", "direct", "sendfile", "exec")
FORMS = ("encoded", "decoded")
_ROW = struct.Struct("=d8QdQ")
_KILLS = struct.Struct("=Q")
_FLAG, _KILLS_AT = 0, 8


class Row(NamedTuple):
    """One reader. `since`: when its current operation began (0: none); `longest`: its longest operation, seconds, and
    `kills` how many kills there were during it."""

    since: float = 0.0
    read: int = 0
    mmap: int = 0
    direct: int = 0
    sendfile: int = 0
    exec: int = 0
    errors: int = 0
    wrong_encoded: int = 0
    wrong_decoded: int = 0
    longest: float = 0.0
    kills: int = 0


class Board:
    """The shared file. Every reader writes its own row only."""

    def __init__(self, path: Path, readers: int, *, create: bool = False) -> None:
        self.readers = readers
        size = 4096 + readers * _ROW.size
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), size)

    @property
    def paused(self) -> bool:
        return bool(self._map[_FLAG])

    @paused.setter
    def paused(self, value: bool) -> None:
        self._map[_FLAG] = value

    @property
    def kills(self) -> int:
        return int(_KILLS.unpack_from(self._map, _KILLS_AT)[0])

    @kills.setter
    def kills(self, value: int) -> None:
        _KILLS.pack_into(self._map, _KILLS_AT, value)

    def __getitem__(self, number: int) -> Row:
        return Row(*_ROW.unpack_from(self._map, 4096 + number * _ROW.size))

    def __setitem__(self, number: int, row: Row) -> None:
        at = 4096 + number * _ROW.size
        self._map[at : at + _ROW.size] = _ROW.pack(*row)  # pack_into zeroes the place first, and others look at it

    def rows(self) -> list[Row]:
        return [self[number] for number in range(self.readers)]

    def total(self, name: str) -> int:
        return sum(int(getattr(row, name)) for row in self.rows())
