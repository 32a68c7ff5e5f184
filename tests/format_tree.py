"""The EROFS half of the second reader (docs/format.md, section 4): superblock, devices, inodes, directories, data."""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tests.format_data import INLINE, PLAIN, Extent, Inode, Mapper, Slot
from tests.format_reader import BLOCK, DECODED, ENCODED, Blob, Payload, crc32c, is_zero, require, take

SUPER = 1024
# LZ4_0PADDING, COMPR_CFGS, CHUNKED_FILE, FRAGMENTS
INCOMPAT = {ENCODED: 0x1 | 0x2 | 0x4 | 0x20, DECODED: 0x4}
DEVICE_TABLE = 0x8
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
FINGERPRINT = 5
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


@dataclass
class Entry:
    """One path: `mtime` in nanoseconds; `rdev` (major, minor); `content` the sha256 in hex of a regular file."""

    nid: int
    mode: int
    uid: int
    gid: int
    mtime: int
    nlink: int
    size: int
    xattrs: dict[bytes, bytes]
    rdev: tuple[int, int] | None = None
    target: bytes | None = None
    content: str | None = None
    fingerprint: bytes = b""


class Tree:
    """One form of an image over its data blobs."""

    def __init__(self, payload: Payload, blobs: list[Blob]) -> None:
        self.form, self._data, self._blobs = payload.form, payload.erofs, blobs
        self._read_superblock()
        self._read_slots()
        self._mapper = Mapper(self.form, self._data, blobs, self.slots)
        if self.packed_nid:
            require(self.form == ENCODED, "decoded form: packed inode")
            self._mapper.packed = packed = self._mapper.extents(self.inode(self.packed_nid))
            whole = all(
                one.blob is not None and one.length == blobs[one.blob].table.content_blocks[one.frame] * BLOCK
                for one in packed
            )
            require(whole, "packed inode: not whole frames")
        self._hash = lru_cache(1 << 16)(self._hash_inode)

    # Superblock and devices

    def _read_superblock(self) -> None:
        block = take(self._data, SUPER, BLOCK - SUPER, "superblock")
        require(block[:4] == struct.pack("<I", 0xE0F5E1E2), "superblock: magic")
        stored, self._compat = struct.unpack("<II", block[4:12])
        require(bool(self._compat & 1), "superblock: no checksum")
        # Kernel: the CRC without its final inversion, over the rest of the block, with its own field as zero.
        require(stored ^ 0xFFFFFFFF == crc32c(block[:4] + bytes(4) + block[8:]), "superblock: checksum")
        require(block[12] == 12, "superblock: block size")
        require(block[13] == 0 and block[90:92] == b"\0\0", "superblock: slots, directory blocks or prefixes")
        (start,) = struct.unpack("<I", block[92:96])
        self.has_fingerprints = start == 255
        require(start in (0, 255), "superblock: place of the prefix")
        if self.has_fingerprints:
            require(self._data[1020:1024] == b"\1\0\5\0", "superblock: prefix of fingerprints")
        self._root_nid, self._inodes, self._epoch, self._nsec = struct.unpack("<HQqI", block[14:36])
        blocks, meta_block, xattr_block = struct.unpack("<III", block[36:48])
        require(blocks * BLOCK == len(self._data), "superblock: number of blocks")
        self._meta, self._shared = meta_block * BLOCK, xattr_block * BLOCK
        self.incompat, algorithms, self._devices, slot_offset = struct.unpack("<IHHH", block[80:90])
        expected = INCOMPAT[self.form] | (DEVICE_TABLE if self._blobs else 0)
        require(self.incompat == expected, "superblock: feature_incompat")
        require(algorithms == (1 << 3 if self.form == ENCODED else 0), "superblock: algorithms")
        if self.form == ENCODED:
            record = take(self._data, SUPER + 128, 8, "configuration of zstd")
            require(record[:3] == b"\6\0\0" and record[3] <= 10 and is_zero(record[4:]), "configuration of zstd")
        self._slots_at = slot_offset * 128
        (self.packed_nid,) = struct.unpack("<Q", block[96:104])

    def _read_slots(self) -> None:
        require(self._devices == len(self._blobs), "superblock: number of devices")
        self.slots = []
        end = len(self._data) // BLOCK
        for number, blob in enumerate(self._blobs):
            raw = take(self._data, self._slots_at + 128 * number, 128, "device slot")
            blocks, start, high_blocks, high_start = struct.unpack("<IIHH", raw[64:76])
            require(not high_blocks and not high_start and is_zero(raw[76:]), "device slot: reserved bytes")
            table = blob.table
            named = hashlib.sha256(b"erofs-ondemand decoded\n" + table.digest).digest()
            tag = table.digest if self.form == ENCODED else named
            size = table.size if self.form == ENCODED else table.decoded_size
            require(raw[:64] == tag.hex().encode(), "device slot: tag")
            require(blocks * BLOCK == size, "device slot: blocks")
            require(start == end, "device slot: uniaddr")
            end = start + blocks
            self.slots.append(Slot(raw[:64], blocks, start))

    # Inodes

    @lru_cache(1 << 14)  # noqa: B019 - lives as long as the test's tree
    def inode(self, nid: int) -> Inode:
        """Read an inode and its extended attributes."""
        at = self._meta + 32 * nid
        raw = take(self._data, at, 32, "inode")
        format_, xattr_count, mode = struct.unpack("<HHH", raw[:6])
        require(format_ >> 4 == 0, "inode: unknown format bits")
        layout, size = format_ >> 1 & 7, 32
        if format_ & 1:
            raw, size = take(self._data, at, 64, "inode"), 64
            length, union, _, uid, gid, seconds, nsec, nlink = struct.unpack("<QIIIIqII", raw[8:48])
        else:
            nlink, length, _, union, _, uid, gid = struct.unpack("<HIIIIHH", raw[6:28])
            seconds, nsec = self._epoch, self._nsec
        require(length < 1 << 63 and nsec < 10**9, "inode: size or mtime")
        require(stat.S_IFMT(mode) in FILE_TYPES, "inode: type")
        body = at + size + (12 + 4 * (xattr_count - 1) if xattr_count else 0)
        mtime = seconds * 10**9 + nsec
        xattrs = self._xattrs(at + size, body) if xattr_count else {}
        return Inode(nid, layout, mode, length, union, uid, gid, mtime, nlink, body, xattrs)

    def _xattrs(self, start: int, end: int) -> dict[bytes, bytes]:
        body = take(self._data, start, end - start, "xattrs")
        require(len(body) > 12, "xattrs: empty body")
        shared, found, position = body[4], {}, 12 + 4 * body[4]
        require(is_zero(body[5:12]), "xattrs: reserved bytes")
        for number in range(shared):
            (where,) = struct.unpack("<I", take(body, 12 + 4 * number, 4, "shared xattr"))
            name, value, _ = self._xattr(self._data, self._shared + 4 * where)
            require(name not in found, "xattrs: twice the same name")
            found[name] = value
        while position < len(body):
            name, value, position = self._xattr(body, position)
            require(name not in found, "xattrs: twice the same name")
            found[name] = value
        require(position == len(body), "xattrs: size of the body")
        return found

    @staticmethod
    def _xattr(data: bytes, at: int) -> tuple[bytes, bytes, int]:
        name_size, prefix, value_size = struct.unpack("<BBH", take(data, at, 4, "xattr"))
        raw = take(data, at + 4, name_size + value_size, "xattr")
        end = at + 4 + -(-(name_size + value_size) // 4) * 4
        if prefix == FINGERPRINT:
            require(name_size == 0 and value_size == 24, "xattr: fingerprint")
            return b"", raw, end
        require(prefix in XATTR_PREFIXES, "xattr: prefix")
        return XATTR_PREFIXES[prefix] + raw[:name_size], raw[name_size:], end

    def _flat(self, inode: Inode) -> bytes:
        """The bytes of a directory or symlink, which lie in the metadata."""
        require(inode.layout in (PLAIN, INLINE), "directory or symlink: layout")
        if inode.layout == PLAIN:
            return take(self._data, inode.union * BLOCK, inode.size, "data") if inode.size else b""
        whole = inode.size // BLOCK * BLOCK
        tail = inode.size - whole
        require(inode.body % BLOCK + tail <= BLOCK, "inline tail crosses a block")
        head = take(self._data, inode.union * BLOCK, whole, "data") if whole else b""
        return head + take(self._data, inode.body, tail, "inline tail")

    # Directories

    def _names(self, inode: Inode) -> dict[bytes, tuple[int, int]]:
        """Name to (nid, type) of a directory; the names must be in byte order."""
        data, found, last = self._flat(inode), {}, b""
        for base in range(0, len(data), BLOCK):
            block = data[base : base + BLOCK]
            (first,) = struct.unpack("<H", take(block, 8, 2, "directory"))
            require(first > 0 and first % 12 == 0, "directory: first name's offset")
            rows = [struct.unpack("<QHBB", take(block, i, 12, "directory")) for i in range(0, first, 12)]
            offsets = [row[1] for row in rows] + [len(block)]
            for number, (nid, offset, kind, zero) in enumerate(rows):
                require(first <= offset < offsets[number + 1] <= len(block) and zero == 0, "directory: name offset")
                name = block[offset : offsets[number + 1]]
                name = name.rstrip(b"\0") if number + 1 == len(rows) else name
                require(1 <= len(name) <= 255 and b"\0" not in name and b"/" not in name, "directory: name")
                require(name > last, "directory: order of names")
                found[name], last = (nid, kind), name
        return found

    def walk(self) -> dict[bytes, Entry]:
        """Every path of the image; the root is `b"."`."""
        found: dict[bytes, Entry] = {}
        names: dict[int, int] = {}
        seen: set[int] = set()
        pending = [(b"", self._root_nid, self._root_nid)]
        while pending:
            path, nid, parent = pending.pop()
            require(nid not in seen, "directory with two names")
            seen.add(nid)
            found[path or b"."] = self._entry(nid)
            children = self._names(self.inode(nid))
            require(children.pop(b".", None) == (nid, 2), "directory: dot")
            require(children.pop(b"..", None) == (parent, 2), "directory: dot dot")
            below = sum(kind == 2 for _, kind in children.values())
            require(self.inode(nid).nlink == 2 + below, "directory: number of links")
            for name, (child, kind) in children.items():
                full = path + b"/" + name if path else name
                require(FILE_TYPES[stat.S_IFMT(self.inode(child).mode)] == kind, "directory: type of an entry")
                if kind == 2:
                    pending.append((full, child, nid))
                    continue
                found[full] = self._entry(child)
                names[child] = names.get(child, 0) + 1
        require(self._inodes == len(seen) + len(names) + bool(self.packed_nid), "superblock: number of inodes")
        for nid, count in names.items():
            require(self.inode(nid).nlink == count, "inode: number of links")
        return found

    def _entry(self, nid: int) -> Entry:
        inode = self.inode(nid)
        xattrs = dict(inode.xattrs)
        fingerprint = xattrs.pop(b"", b"")
        entry = Entry(nid, inode.mode, inode.uid, inode.gid, inode.mtime, inode.nlink, inode.size, xattrs)
        kind = stat.S_IFMT(inode.mode)
        entry.fingerprint = fingerprint
        allowed = self.has_fingerprints and kind == stat.S_IFREG and inode.size
        require(bool(allowed) or not fingerprint, "fingerprint where none can be")
        if kind == stat.S_IFREG:
            entry.content = self._hash(nid)
        elif kind == stat.S_IFLNK:
            entry.target = self._flat(inode)
            require(0 < inode.size < BLOCK and b"\0" not in entry.target, "symlink: target")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            require(inode.size == 0, "device: size")
            entry.rdev = (inode.union >> 8 & 0xFFF, inode.union & 0xFF | inode.union >> 12 & 0xFFF00)
        return entry

    # Data

    def extents(self, nid: int) -> list[Extent]:
        """Where the data of the regular file `nid` is, in order."""
        return self._mapper.extents(self.inode(nid))

    def map_header(self, nid: int) -> int:
        """The eight bytes behind inode and extended attributes of a file in the encoded form."""
        return int.from_bytes(take(self._data, -(-self.inode(nid).body // 8) * 8, 8, "map header"), "little")

    def _hash_inode(self, nid: int) -> str:
        digest = hashlib.sha256()
        inode, position = self.inode(nid), 0
        for extent in self._mapper.extents(inode):
            require(extent.start == position, "file: gap in the data")
            position += extent.length
            for piece in self._bytes(extent):
                digest.update(piece)
        require(position == inode.size, "file: data shorter than its size")
        return digest.hexdigest()

    def _bytes(self, extent: Extent) -> Iterator[memoryview]:
        if extent.blob is None:
            zeros = memoryview(bytes(min(extent.length, 1 << 20)))
            for start in range(0, extent.length, 1 << 20):
                yield zeros[: extent.length - start]
            return
        content = memoryview(self._blobs[extent.blob].content(extent.frame))
        require(extent.skip + extent.length <= len(content), "file: takes more than the frame's content")
        yield content[extent.skip : extent.skip + extent.length]
