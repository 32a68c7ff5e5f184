"""Tar, read as a stream: V7, ustar, GNU and PAX entries with their xattrs, sparse maps and data.

Semantics where the formats leave room are those of Go's archive/tar, which OCI tools share: links, devices and
directories have no data whatever their size says; a stream may end at an entry's boundary without the two zero blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from erofs_builder import pax
from erofs_builder.chunkreader import ChunkReader
from erofs_builder.errors import TarError, UnsupportedError
from erofs_builder.hot import Sha256, parse_tar_header, scan_tar_headers
from erofs_builder.pax import Records, Segments

BLOCK = 512
# Long names, PAX headers: 1 MiB is what Go accepts; xattrs of 64 KiB each fit sixteen times.
MAX_EXTENSION = 1 << 20
_HEADERS_PER_ENTRY = 64
_MAX_GLOBALS = 256  # each is worked on again for each entry; real archives have a handful
_EMPTY: dict[bytes, bytes] = {}

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0123456"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"xgX"
_LONG_NAME, _LONG_LINK, _GNU_SPARSE, _GNU_DUMP = b"LKSD"
_SOLARIS_ACL, _VOLUME = b"AV"
_EXTENSIONS = frozenset((_PAX, _PAX_GLOBAL, _PAX_SOLARIS, _LONG_NAME, _LONG_LINK, _SOLARIS_ACL, _VOLUME))
_SAME_AS_REGULAR = frozenset(b"\0" + b"7")  # V7's, and "contiguous" files
_FILE_KINDS = _SAME_AS_REGULAR | {REGULAR}
_HASHED_MAX = 256 << 10  # larger files are hashed in pieces, by whoever cuts them
_PLAIN_KINDS = frozenset(b"0123456")
_FIELDS = ("mode", "uid", "gid", "size", "mtime", "devmajor", "devminor")


@dataclass(slots=True, eq=False)
class TarEntry:
    """One entry. Names are bytes as the archive holds them; `size` is the file's, `segments` set when it is sparse."""

    name: bytes
    kind: int  # REGULAR, HARD_LINK, … (the ustar type byte)
    mode: int  # permission bits, 07777
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    size: int
    link: bytes
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    segments: Segments | None
    offset: int  # of the entry's last header in the plain tar, for messages
    digest: bytes | None = None  # sha256 of its stored bytes, where it is known already


class Header(NamedTuple):
    """A header block's own fields. Lengths say how much of the block's name fields is used."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    devmajor: int
    devminor: int
    name_length: int
    link_length: int
    prefix_length: int
    kind: int


@dataclass(slots=True)
class _Overrides:
    """What the extension headers before an entry say about it."""

    name: bytes | None = None
    link: bytes | None = None
    records: Records | None = None


_NO_OVERRIDES = _Overrides()  # of nearly all entries, and never changed


class TarReader:
    """Iterates over the entries; an entry's stored bytes can be read until the next one is asked for.

    `whole` takes in the archive, and what lies behind it.
    """

    def __init__(self, chunks: Iterator[bytes], whole: Sha256 | None = None) -> None:
        self._input = ChunkReader(chunks, whole)
        self.sha256_many = self._input.sha256_many
        self._scanned: dict[int, tuple[int, ...]] = {}  # headers parsed ahead of time, by offset
        self._digests: dict[int, tuple[int, bytes]] = {}  # length and sha256 of small files' data, by offset
        self._global: dict[bytes, bytes] = {}
        self._left = 0  # stored bytes of the current entry not read yet
        self._padding = 0

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self._at_hand() or self._next_entry()) is not None:
            yield entry

    def read(self, size: int) -> memoryview:
        """The next `size` stored bytes of the current entry."""
        if size > self._left:
            raise TarError(f"tar: read behind the end of an entry at offset {self._input.offset}")
        self._left -= size
        return self._input.take(size)

    def peek(self, size: int) -> bytes:
        """The first stored bytes of the current entry, `size` at most, often fewer at the border of two reads."""
        return self._input.peek(min(size, self._left))

    def _at_hand(self) -> TarEntry | None:
        """The next entry, if its header was scanned and says all of it: what `_next_entry` has, in a third of the time.

        A scanned header lies in the current chunk, and so do the bytes before it that are left of the last entry.
        """
        source = self._input
        start = source.at + self._left + self._padding
        offset = source.base + start
        record = self._scanned.get(offset)
        if record is None or record[1] or record[12] not in _PLAIN_KINDS or self._global:
            return None
        _, _, mode, uid, gid, size, mtime, major, minor, name_length, link_length, prefix_length, kind = record
        digest = None
        if kind != REGULAR:
            size = 0
        elif size < 0:
            return None
        elif known := self._digests.get(offset + BLOCK):
            digest = known[1]
        source.at = start + BLOCK
        self._left = size
        self._padding = -size % BLOCK
        chunk = source.chunk
        name = chunk[start : start + name_length]
        if prefix_length:
            name = chunk[start + 345 : start + 345 + prefix_length] + b"/" + name
        link = chunk[start + 157 : start + 157 + link_length] if link_length else b""
        return TarEntry(
            name, kind, mode & 0o7777, uid, gid, mtime, 0, size, link, (major, minor), _EMPTY, None, offset, digest
        )

    def _next_entry(self) -> TarEntry | None:
        overrides = _NO_OVERRIDES
        for _ in range(_HEADERS_PER_ENTRY):
            if self._left:
                self._input.skip(self._left)
            if self._padding and not self._input.at_end():  # `umoci insert` ends its layers with the last file's bytes
                self._input.skip(self._padding)
            self._left = self._padding = 0
            offset = self._input.offset
            found = self._header(offset)
            if found is None:
                if overrides is not _NO_OVERRIDES and overrides != _NO_OVERRIDES:
                    raise TarError(f"tar: extension headers without an entry before offset {offset}")
                return None
            header, block = found
            if header.kind in _PLAIN_KINDS and overrides.records is None and not self._global:
                return self._simple(header, block, overrides, offset)
            if header.kind not in _EXTENSIONS:
                return self._entry(header, block, overrides, offset)
            if overrides is _NO_OVERRIDES:
                overrides = _Overrides()
            self._extension(header, overrides, offset)
        raise TarError(f"tar: more than {_HEADERS_PER_ENTRY} headers for one entry before offset {self._input.offset}")

    def _header(self, offset: int) -> tuple[Header, memoryview] | None:
        if self._input.at_end():
            return None
        record = self._scanned.pop(offset, None)
        if record is None:
            self._scan(offset)
            record = self._scanned.pop(offset, None)
        block = self._input.take(BLOCK)
        status, fields = (record[1], record[2:]) if record is not None else parse_tar_header(block)
        if status == 0:
            return Header(*fields), block
        if status == 1:
            if not self._input.at_end() and self._input.take(BLOCK) != bytes(BLOCK):
                raise TarError(f"tar: a zero block and then something else at offset {offset}")
            self._input.drain()
            return None
        what = "checksum" if status == -1 else _FIELDS[-2 - status]
        raise TarError(f"tar: bad {what} in the header at offset {offset}")

    def _scan(self, offset: int) -> None:
        """Parse the headers that are at hand, and hash the small files between them.

        One call for many: each gives up Python's lock, and waits to get it back.
        """
        window = self._input.window()
        records = scan_tar_headers(window)
        self._scanned = {offset + record[0]: record for record in records}
        places = [
            (record[0] + BLOCK, record[5])
            for record in records
            if 0 < record[5] <= _HASHED_MAX
            and record[12] in _FILE_KINDS
            and record[0] + BLOCK + record[5] <= len(window)
        ]
        digests = self.sha256_many(window, places)
        self._digests = {offset + at: (size, digest) for (at, size), digest in zip(places, digests, strict=True)}

    def _digest(self, size: int) -> bytes | None:
        """What is known of the `size` bytes that come next."""
        length, digest = self._digests.get(self._input.offset, (-1, None))
        return digest if length == size else None

    def _open(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    def _simple(self, header: Header, block: memoryview, overrides: _Overrides, offset: int) -> TarEntry:
        """An entry without PAX records: nearly all of most archives, so kept short."""
        mode, uid, gid, size, mtime, major, minor, _, link_length, _, kind = header
        if kind != REGULAR:
            size = 0
        if size < 0:
            raise TarError(f"tar: negative size in the header at offset {offset}")
        self._open(size)
        name = _name(header, block) if overrides.name is None else overrides.name
        link = overrides.link
        if link is None:
            link = bytes(block[157 : 157 + link_length]) if link_length else b""
        digest = self._digest(size) if size else None
        return TarEntry(
            name, kind, mode & 0o7777, uid, gid, mtime, 0, size, link, (major, minor), _EMPTY, None, offset, digest
        )

    def _extension(self, header: Header, overrides: _Overrides, offset: int) -> None:
        """Take in a header that describes the next entry."""
        kind = header.kind
        if not 0 <= header.size <= MAX_EXTENSION:
            raise TarError(f"tar: extension header of {header.size} bytes at offset {offset}, at most {MAX_EXTENSION}")
        data = bytes(self._input.take(header.size))
        self._padding = -header.size % BLOCK
        if kind == _LONG_NAME:
            overrides.name = data.split(b"\0", 1)[0]
        elif kind == _LONG_LINK:
            overrides.link = data.split(b"\0", 1)[0]
        elif kind in (_PAX, _PAX_SOLARIS):
            overrides.records = _at_offset(pax.parse_records, data, offset)
        elif kind == _PAX_GLOBAL:
            self._take_globals(_at_offset(pax.parse_records, data, offset), offset)

    def _take_globals(self, records: Records, offset: int) -> None:
        for key, value in records:
            if value:
                self._global[key] = value
            else:
                self._global.pop(key, None)
        size = sum(len(key) + len(value) for key, value in self._global.items())
        if size > MAX_EXTENSION or len(self._global) > _MAX_GLOBALS:
            raise TarError(f"tar: {len(self._global)} global PAX records, {size} bytes, at offset {offset}: too many")

    def _entry(self, header: Header, block: memoryview, overrides: _Overrides, offset: int) -> TarEntry:
        try:
            return self._described(header, block, overrides, offset)
        except TarError as error:
            if "offset" in str(error):
                raise
            raise TarError(f"{error} (entry at offset {offset})") from None

    def _described(self, header: Header, block: memoryview, overrides: _Overrides, offset: int) -> TarEntry:
        local = overrides.records or []
        records = {**self._global, **dict(local)} if self._global or local else {}
        name, link = _names(header, block, overrides, records)
        kind = _kind(header.kind, name, offset)
        stored = pax.parse_size(b"size", records[b"size"]) if records.get(b"size") else header.size
        if kind != REGULAR and header.kind != _GNU_DUMP:
            stored = 0
        if stored < 0:
            raise TarError(f"tar: negative size in the header at offset {offset}")
        self._open(stored)
        size, segments = self._sparse(header, block, records, local, stored)
        if segments is not None:
            name = records.get(b"GNU.sparse.name") or name
        mtime, mtime_nsec = header.mtime, 0
        if records.get(b"mtime"):
            mtime, mtime_nsec = pax.parse_time(b"mtime", records[b"mtime"])
        return TarEntry(
            name,
            kind,
            header.mode & 0o7777,
            _number(records, b"uid", header.uid),
            _number(records, b"gid", header.gid),
            mtime,
            mtime_nsec,
            size if kind == REGULAR else 0,
            link,
            (
                _number(records, b"SCHILY.devmajor", header.devmajor),
                _number(records, b"SCHILY.devminor", header.devminor),
            ),
            _xattrs(records),
            segments,
            offset,
            self._digest(size) if segments is None else None,
        )

    def _sparse(
        self, header: Header, block: memoryview, records: dict[bytes, bytes], local: Records, stored: int
    ) -> tuple[int, Segments | None]:
        """The file's size and, when it is sparse, its map. Maps before the data are read from the stream."""
        if header.kind == _GNU_SPARSE:
            return self._old_gnu_sparse(block, stored)
        if records.get(b"GNU.sparse.major") == b"1":
            size = pax.parse_size(b"GNU.sparse.realsize", records.get(b"GNU.sparse.realsize", b""))
            return size, pax.check_segments(self._sparse_map_1_0(), size, self._left)
        if b"GNU.sparse.map" in records:
            numbers = records[b"GNU.sparse.map"].split(b",") if records[b"GNU.sparse.map"] else []
        elif b"GNU.sparse.size" in records:
            numbers = [value for key, value in local if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        else:
            return stored, None
        size = pax.parse_size(
            b"GNU.sparse.size", records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize", b"")
        )
        return size, pax.check_segments(pax.pairs(numbers), size, stored)

    def _sparse_map_1_0(self) -> list[tuple[int, int]]:
        """Format 1.0: decimal lines (count, then offset and length of each) in the first blocks of the data."""
        text = bytearray()
        lines: list[bytes] = []
        wanted = 1
        while len(lines) < wanted:
            text += self.read(BLOCK)
            *complete, rest = bytes(text).split(b"\n")
            lines += complete
            text = bytearray(rest)
            if lines and wanted == 1:
                count = pax.parse_size(b"GNU.sparse.map", lines[0])
                if count > pax.MAX_SEGMENTS:
                    raise TarError(f"sparse map: {count} segments, at most {pax.MAX_SEGMENTS}")
                wanted = 1 + 2 * count
            if len(lines) < wanted and len(text) > 40:
                raise TarError("sparse map: a number is too long")
        return pax.pairs(lines[1:wanted])

    def _old_gnu_sparse(self, block: memoryview, stored: int) -> tuple[int, Segments]:
        """The old GNU format: four segments in the header, 21 more in each extension block behind it."""
        numbers = [_old_number(block, 386 + 12 * index) for index in range(8)]
        size = _old_number(block, 483)
        more = block[482]
        while more:
            extension = self._input.take(BLOCK)
            numbers += [_old_number(extension, 12 * index) for index in range(42)]
            more = extension[504]
            if len(numbers) > 2 * pax.MAX_SEGMENTS:
                raise TarError(f"sparse map: more than {pax.MAX_SEGMENTS} segments")
        # Unused slots are zeros; a real last segment of length 0 only marks the file's end.
        pairs = [pair for pair in zip(numbers[::2], numbers[1::2], strict=True) if pair != (0, 0)]
        return size, pax.check_segments(pairs, size, stored)


def _at_offset(parse: object, data: bytes, offset: int) -> Records:
    try:
        return parse(data)  # type: ignore[operator, no-any-return]
    except TarError as error:
        raise TarError(f"{error} (PAX header at offset {offset})") from None


def _name(header: Header, block: memoryview) -> bytes:
    name = bytes(block[: header.name_length])
    if header.prefix_length:
        return bytes(block[345 : 345 + header.prefix_length]) + b"/" + name
    return name


def _names(
    header: Header, block: memoryview, overrides: _Overrides, records: dict[bytes, bytes]
) -> tuple[bytes, bytes]:
    name = records.get(b"path") or overrides.name
    link = records.get(b"linkpath") or overrides.link
    if name is None:
        name = _name(header, block)
    if link is None:
        link = bytes(block[157 : 157 + header.link_length])
    return name, link


def _kind(kind: int, name: bytes, offset: int) -> int:
    if kind in _PLAIN_KINDS:
        return kind
    if kind in _SAME_AS_REGULAR:
        return DIRECTORY if name.endswith(b"/") else REGULAR
    if kind == _GNU_SPARSE:
        return REGULAR
    if kind == _GNU_DUMP:
        return DIRECTORY
    raise UnsupportedError(f"tar: entry type {chr(kind)!r} of {name.decode(errors='replace')!r} at offset {offset}")


def _number(records: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    value = records.get(key)
    return pax.parse_integer(key, value) if value else otherwise


def _xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    found = dict(pair for key, value in records.items() if (pair := pax.parse_xattr(key, value)))
    return found or _EMPTY


def _old_number(block: memoryview, offset: int) -> int:
    field = bytes(block[offset : offset + 12])
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=True) & ((1 << 95) - 1)
    else:
        text = field.strip(b" \0") or b"0"
        try:
            number = int(text, 8)
        except ValueError:
            raise TarError(f"sparse map: not a number: {field!r}") from None
    if not 0 <= number < 1 << 63:
        raise TarError(f"sparse map: {number} is out of range")
    return number
