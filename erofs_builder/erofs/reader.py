"""Read EROFS metadata that this project wrote back into a tree of Nodes, whoever may have tampered with it.

Anything malformed is an ErofsError. Work and memory are bounded by the image's size (source.py).
"""

from __future__ import annotations

import stat
from collections.abc import Sequence

from erofs_builder import fingerprint
from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.inodes import (
    FINGERPRINT_NAME,
    Entry,
    Inode,
    XattrReader,
    read_directory,
    read_flat,
    read_inode,
)
from erofs_builder.erofs.layout import BLOCK, BLOCK_BITS, DEVICE_SLOT, DEVICE_SLOT_SIZE, SUPER_OFFSET, Superblock
from erofs_builder.erofs.mapping import DecodedMapper, Device, EncodedMapper, Mapper
from erofs_builder.erofs.source import Source
from erofs_builder.errors import ErofsError
from erofs_builder.frames import FrameTable
from erofs_builder.hot import crc32c_state
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.payload import Form, device_tag

_COMPAT_REQUIRED = on_disk.FEATURE_COMPAT_SB_CHKSUM
_INCOMPAT_DECODED = on_disk.FEATURE_INCOMPAT_CHUNKED_FILE | on_disk.FEATURE_INCOMPAT_DEVICE_TABLE
_INCOMPAT_ENCODED = (
    _INCOMPAT_DECODED
    | on_disk.FEATURE_INCOMPAT_ZERO_PADDING
    | on_disk.FEATURE_INCOMPAT_COMPR_CFGS
    | on_disk.FEATURE_INCOMPAT_FRAGMENTS
)


class Reader:
    """EROFS metadata of one form, with the frame tables of its blobs in the order of the device slots."""

    def __init__(self, erofs: bytes, tables: Sequence[FrameTable], form: Form) -> None:
        self.form = form
        self._source = Source(erofs)
        self.superblock = read_superblock(erofs, form)
        self.blobs = [Blob(table) for table in tables]
        devices = self._devices(tables)
        self._xattrs = XattrReader(self._source, self.superblock)
        self._mapper: Mapper
        if form is Form.ENCODED:
            self._mapper = encoded = EncodedMapper(self._source, devices)
            if self.superblock.packed_nid:
                packed = read_inode(self._source, self.superblock, self.superblock.packed_nid)
                if not stat.S_ISREG(packed.mode) or packed.layout != on_disk.INODE_COMPRESSED_FULL or not packed.size:
                    raise ErofsError("the packed inode is not a file with an index")
                encoded.load_packed(packed)
        else:
            self._mapper = DecodedMapper(self._source, devices)

    def read_tree(self) -> Node:
        """The whole tree. Hard links are one Node under several names."""
        root_nid = self.superblock.rootnid
        root, inode = self._node(root_nid)
        if not root.is_dir:
            raise ErofsError(f"the root, {inode}, is not a directory")
        nodes = {root_nid: root}
        links: dict[int, int] = {}
        nlinks: dict[int, int] = {}
        pending = [(root, inode, root_nid)]
        while pending:
            directory, inode, parent_nid = pending.pop()
            children = directory.children = {}
            for entry in self._entries(inode, parent_nid):
                links[entry.nid] = links.get(entry.nid, 0) + 1
                child = nodes.get(entry.nid)
                if child is None:
                    child, child_inode = self._node(entry.nid)
                    nodes[entry.nid] = child
                    if child.is_dir:
                        pending.append((child, child_inode, inode.nid))
                    else:
                        nlinks[entry.nid] = child_inode.nlink
                elif child.is_dir:
                    raise ErofsError(f"{inode}: {entry.name!r} is another name of directory {entry.nid}")
                if on_disk.FILE_TYPES[stat.S_IFMT(child.mode)] != entry.file_type:
                    raise ErofsError(f"{inode}: {entry.name!r} is said to be of type {entry.file_type}")
                children[entry.name] = child
        for nid, nlink in nlinks.items():
            if links[nid] != nlink:
                raise ErofsError(f"inode {nid} has {links[nid]} names and says {nlink}")
        return root

    def extents_at(self, nid: int) -> Sequence[Extent]:
        """Where the bytes of the regular file with this nid lie; ErofsError if there is no such inode."""
        return self._node(nid)[0].extents

    def _entries(self, inode: Inode, parent_nid: int) -> list[Entry]:
        entries = read_directory(self._source, self.superblock, inode)
        own = {b".": inode.nid, b"..": parent_nid}
        dots = [entry for entry in entries if entry.name in own]
        if len(dots) != 2 or any(own[dot.name] != dot.nid or dot.file_type != on_disk.FT_DIR for dot in dots):
            raise ErofsError(f"{inode}: its own and its parent's entry are missing or wrong")
        return [entry for entry in entries if entry.name not in own]

    def _node(self, nid: int) -> tuple[Node, Inode]:
        inode = read_inode(self._source, self.superblock, nid)
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_nsec)
        node.xattrs = self._xattrs.read(inode)
        kind = stat.S_IFMT(inode.mode)
        node.fingerprint = node.xattrs.pop(FINGERPRINT_NAME, b"")
        if node.fingerprint:
            fits = kind == stat.S_IFREG and inode.size and len(node.fingerprint) == fingerprint.SIZE
            if not fits or not self.superblock.xattr_prefix_start:
                raise ErofsError(f"{inode}: a fingerprint of {len(node.fingerprint)} bytes where none can be")
        if kind == stat.S_IFREG:
            node.size = inode.size
            if inode.size:
                node.extents = self._mapper.extents(inode)
        elif kind == stat.S_IFDIR:
            node.children = {}
        elif kind == stat.S_IFLNK:
            if not 0 < inode.size <= on_disk.SYMLINK_MAX:
                raise ErofsError(f"{inode}: a symlink of {inode.size} bytes")
            node.target = read_flat(self._source, self.superblock, inode)
            if b"\0" in node.target:
                raise ErofsError(f"{inode}: a symlink with a NUL in its target")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            node.rdev = on_disk.decode_rdev(inode.i_u)
        return node, inode

    def _devices(self, tables: Sequence[FrameTable]) -> list[Device]:
        superblock = self.superblock
        if superblock.extra_devices != len(tables):
            raise ErofsError(f"{superblock.extra_devices} device slots, but {len(tables)} frame tables")
        devices = []
        end = superblock.blocks
        for number, (table, blob) in enumerate(zip(tables, self.blobs, strict=True)):
            offset = (superblock.devt_slotoff + number) * DEVICE_SLOT_SIZE
            slot = self._source.unpack(DEVICE_SLOT, offset, f"device slot {number}")
            size = table.blob_size if self.form is Form.ENCODED else table.decoded_size
            expected = (device_tag(self.form, table.blob_digest).encode(), size >> BLOCK_BITS, end, 0, 0)
            if slot != expected:
                raise ErofsError(f"device slot {number} is not that of blob {table.blob_digest}")
            devices.append(Device(blob, table, end, size >> BLOCK_BITS))
            end += size >> BLOCK_BITS
        return devices


def read_superblock(erofs: bytes, form: Form) -> Superblock:
    """The superblock, after its checksum and every field that this project's images have fixed."""
    if len(erofs) < BLOCK:
        raise ErofsError(f"{len(erofs)} bytes are too short for a superblock")
    superblock = Superblock.unpack_from(erofs)
    if superblock.magic != on_disk.SUPER_MAGIC:
        raise ErofsError(f"no EROFS superblock: magic {superblock.magic:#x}")
    start, end = SUPER_OFFSET + 4, SUPER_OFFSET + 8
    covered = b"".join((erofs[SUPER_OFFSET:start], bytes(4), erofs[end:BLOCK]))
    if not superblock.feature_compat & _COMPAT_REQUIRED or crc32c_state(0xFFFFFFFF, covered) != superblock.checksum:
        raise ErofsError("superblock: checksum missing or wrong")
    known = _INCOMPAT_ENCODED if form is Form.ENCODED else _INCOMPAT_DECODED
    if superblock.feature_incompat & ~known:
        raise ErofsError(
            f"superblock: features {superblock.feature_incompat:#x} are not those of the {form.value} form"
        )
    if superblock.blkszbits != BLOCK_BITS or superblock.sb_extslots or superblock.dirblkbits:
        raise ErofsError("superblock: unknown block or directory block size, or extension slots")
    if superblock.xattr_prefix_count or superblock.xattr_prefix_start not in (0, on_disk.XATTR_PREFIX_START):
        raise ErofsError("superblock: long prefixes of attributes")
    if superblock.blocks << BLOCK_BITS != len(erofs) or superblock.fixed_nsec >= 1_000_000_000:
        raise ErofsError(f"superblock: {superblock.blocks} blocks, but {len(erofs)} bytes")
    return superblock
