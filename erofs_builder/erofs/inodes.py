"""Read inodes: the record, its extended attributes, and the data of directories and symlinks."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.layout import BLOCK, BLOCK_BITS, DIRENT, ISLOT_BITS, XATTR_ENTRY, Superblock
from erofs_builder.erofs.source import Source
from erofs_builder.errors import ErofsError

_U16 = Struct("<H")
# The fingerprint among the attributes that are read; no name in an image can be this.
FINGERPRINT_NAME = b"fingerprint"
_PREFIXES = dict(on_disk.XATTR_PREFIXES) | {on_disk.XATTR_INDEX_FINGERPRINT: FINGERPRINT_NAME}
_LAYOUTS = (
    on_disk.INODE_FLAT_PLAIN,
    on_disk.INODE_COMPRESSED_FULL,
    on_disk.INODE_FLAT_INLINE,
    on_disk.INODE_CHUNK_BASED,
)


class Inode(NamedTuple):
    """An inode's fields; `end` is the offset behind the record and its extended attributes."""

    nid: int
    layout: int
    mode: int
    nlink: int
    size: int
    i_u: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    xattr_offset: int
    xattr_size: int
    end: int

    def __str__(self) -> str:
        return f"inode {self.nid}"


class Entry(NamedTuple):
    """A dirent and its name."""

    name: bytes
    nid: int
    file_type: int


def read_inode(source: Source, superblock: Superblock, nid: int) -> Inode:
    """The inode of a nid; ErofsError if it is outside the image or not one that this project writes."""
    what = f"inode {nid}"
    offset = (superblock.meta_blkaddr << BLOCK_BITS) + (nid << ISLOT_BITS)
    (i_format,) = source.unpack(_U16, offset, what)
    layout = i_format >> on_disk.DATALAYOUT_BIT
    if layout not in _LAYOUTS:
        raise ErofsError(f"{what}: unknown format {i_format:#x}")
    if i_format & on_disk.INODE_LAYOUT_EXTENDED:
        record = on_disk.INODE_EXTENDED
        _, icount, mode, _, size, i_u, _, uid, gid, mtime, nsec, nlink = record.unpack(
            source.take(offset, record.size, what)
        )
    else:
        record = on_disk.INODE_COMPACT
        _, icount, mode, nlink, size, mtime, i_u, _, uid, gid, _ = record.unpack(source.take(offset, record.size, what))
        if mtime:
            raise ErofsError(f"{what}: a compact inode with an mtime of its own")
        mtime, nsec = superblock.epoch, superblock.fixed_nsec
    if stat.S_IFMT(mode) not in on_disk.FILE_TYPES or size >= 1 << 63 or nsec >= 1_000_000_000:
        raise ErofsError(f"{what}: mode {mode:o}, size {size} or nanoseconds {nsec} are impossible")
    xattr_size = on_disk.XATTR_IBODY_HEADER_SIZE + 4 * (icount - 1) if icount else 0
    start = offset + record.size
    return Inode(nid, layout, mode, nlink, size, i_u, uid, gid, mtime, nsec, start, xattr_size, start + xattr_size)


class XattrReader:
    """Extended attributes of inodes; shared entries are decoded once."""

    def __init__(self, source: Source, superblock: Superblock) -> None:
        self._source = source
        self._base = superblock.xattr_blkaddr << BLOCK_BITS
        self._shared: dict[int, tuple[bytes, bytes]] = {}

    def read(self, inode: Inode) -> dict[bytes, bytes]:
        """All attributes of an inode, by full name."""
        if not inode.xattr_size:
            return {}
        what = f"{inode}: extended attributes"
        if inode.xattr_size <= on_disk.XATTR_IBODY_HEADER_SIZE:
            raise ErofsError(f"{what}: an empty body")
        body = self._source.take(inode.xattr_offset, inode.xattr_size, what)
        _, count = on_disk.XATTR_IBODY_HEADER.unpack_from(body)
        position = on_disk.XATTR_IBODY_HEADER_SIZE + 4 * count
        if position > len(body):
            raise ErofsError(f"{what}: {count} shared ones do not fit")
        found: dict[bytes, bytes] = {}
        for start in range(on_disk.XATTR_IBODY_HEADER_SIZE, position, 4):
            name, value = self._shared_entry(int.from_bytes(body[start : start + 4], "little"), what)
            _add(found, name, value, what)
        while position < len(body):
            name, value, size = _decode_entry(body, position, what)
            _add(found, name, value, what)
            position += size
        if position != len(body):
            raise ErofsError(f"{what}: they do not fill their body")
        return found

    def _shared_entry(self, number: int, what: str) -> tuple[bytes, bytes]:
        if number not in self._shared:
            offset = self._base + 4 * number
            head = self._source.peek(offset, XATTR_ENTRY.size, what)
            name_length, _, value_length = XATTR_ENTRY.unpack(head)
            size = XATTR_ENTRY.size + name_length + value_length
            name, value, _ = _decode_entry(self._source.take(offset, size + -size % 4, what), 0, what)
            self._shared[number] = name, value
        return self._shared[number]


def _add(found: dict[bytes, bytes], name: bytes, value: bytes, what: str) -> None:
    if name in found:
        raise ErofsError(f"{what}: {name!r} is there twice")
    found[name] = value


def _decode_entry(data: bytes, offset: int, what: str) -> tuple[bytes, bytes, int]:
    if offset + XATTR_ENTRY.size > len(data):
        raise ErofsError(f"{what}: an entry is cut off")
    name_length, index, value_length = XATTR_ENTRY.unpack_from(data, offset)
    start = offset + XATTR_ENTRY.size
    end = start + name_length + value_length
    prefix = _PREFIXES.get(index)
    if prefix is None or bool(name_length) != prefix.endswith(b".") or end > len(data):
        raise ErofsError(f"{what}: an entry of namespace {index} with a name of {name_length} bytes")
    size = end - offset
    return prefix + data[start : start + name_length], data[start + name_length : end], size + -size % 4


def read_flat(source: Source, superblock: Superblock, inode: Inode) -> bytes:
    """All data of a directory or symlink."""
    if inode.layout not in (on_disk.INODE_FLAT_PLAIN, on_disk.INODE_FLAT_INLINE):
        raise ErofsError(f"{inode}: a directory or symlink of layout {inode.layout}")
    what = f"{inode}: data"
    inline = inode.layout == on_disk.INODE_FLAT_INLINE
    whole = inode.size & -BLOCK if inline else inode.size
    data = source.take(inode.i_u << BLOCK_BITS, whole, what) if whole else b""
    tail = inode.size - whole
    if not inline:
        return data
    if not tail or inode.end % BLOCK + tail > BLOCK:
        raise ErofsError(f"{what}: an inline tail of {tail} bytes at {inode.end}")
    return data + source.take(inode.end, tail, what)


def read_directory(source: Source, superblock: Superblock, inode: Inode) -> list[Entry]:
    """A directory's entries, "." and ".." among them, in order; ErofsError unless a kernel could search them."""
    data = read_flat(source, superblock, inode)
    entries: list[Entry] = []
    for start in range(0, len(data), BLOCK):
        entries += _block_entries(data[start : start + BLOCK], inode)
    names = [entry.name for entry in entries]
    if any(before >= after for before, after in zip(names, names[1:], strict=False)):
        raise ErofsError(f"{inode}: names are not sorted")
    return entries


def _block_entries(block: bytes, inode: Inode) -> Iterator[Entry]:
    if len(block) < DIRENT.size:
        raise ErofsError(f"{inode}: a directory block of {len(block)} bytes")
    (_, first, _, _) = DIRENT.unpack_from(block)
    if not first or first % DIRENT.size or first > len(block):
        raise ErofsError(f"{inode}: a directory block's names start at {first}")
    records = list(DIRENT.iter_unpack(block[:first]))
    ends = [record[1] for record in records[1:]]
    last = block.find(b"\0", records[-1][1])
    ends.append(len(block) if last < 0 else last)
    for (nid, start, file_type, _), end in zip(records, ends, strict=True):
        name = block[start:end]
        if not first <= start < end <= len(block) or len(name) > on_disk.NAME_MAX or b"/" in name or b"\0" in name:
            raise ErofsError(f"{inode}: a name at {start} to {end} of a directory block: {name[:300]!r}")
        yield Entry(name, nid, file_type)
