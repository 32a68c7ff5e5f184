"""Write a tree's EROFS metadata in one form, over data blobs that are devices of their own.

    0       superblock at 1024 · compression configuration · device table
            inodes in slots of 32 bytes, the root first, the packed inode last; each followed by its extended attributes
            and its index, chunk indexes, or the tail of its directory data or symlink
            whole blocks of directories and long symlinks · the frame of zeros · shared extended attributes
            zeros up to a multiple of 64 KiB

The same tree over the same blobs gives the same bytes.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from erofs_builder.erofs import dirs
from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.chunks import DecodedFiles
from erofs_builder.erofs.indexes import EncodedFiles, index_size
from erofs_builder.erofs.layout import (
    BLOCK,
    BLOCK_BITS,
    DATALAYOUT_BIT,
    INODE_FLAT_INLINE,
    INODE_FLAT_PLAIN,
    ISLOT_BITS,
    U32_MAX,
    blocks_of,
)
from erofs_builder.erofs.regular import Body
from erofs_builder.erofs.superblock import Devices, Fields, devices_end, write_head
from erofs_builder.erofs.survey import Survey
from erofs_builder.erofs.xattrs import icount
from erofs_builder.erofs.zeros import zero_frame
from erofs_builder.errors import UnsupportedError
from erofs_builder.model import Blob, Node
from erofs_builder.payload import ALIGNMENT, Form

_pack_compact, _pack_extended = on_disk.INODE_COMPACT.pack_into, on_disk.INODE_EXTENDED.pack_into
# With 8 bytes behind them: inodes lie at multiples of 32, so there is no gap.
_pack_short_compact = Struct(f"{on_disk.INODE_COMPACT.format}Q").pack_into
_pack_short_extended = Struct(f"{on_disk.INODE_EXTENDED.format}Q").pack_into
_COMPACT_SIZE, _EXTENDED_SIZE = on_disk.INODE_COMPACT.size, on_disk.INODE_EXTENDED.size


class Metadata(NamedTuple):
    """EROFS metadata, a multiple of 64 KiB, and the blobs behind its device slots, in their order."""

    erofs: bytes
    blobs: list[Blob]


def write_metadata(root: Node, form: Form, blobs: Sequence[Blob], *, device_table: bool = True) -> Metadata:
    """Lay out and encode a tree.

    `blobs` gives the order of the device slots; those that no file refers to are left out. Without `device_table` the
    blobs follow the metadata in the same file, one after the other (flat.py). UnsupportedError names a path and what
    EROFS cannot express of it; ValueError is a tree that breaks the promises of model.Extent.
    """
    image, used = write_image(Survey(root, blobs), form, device_table=device_table)
    return Metadata(bytes(image), used)


def write_image(survey: Survey, form: Form, *, device_table: bool = True) -> tuple[bytearray, list[Blob]]:
    """`write_metadata` of a surveyed tree, without a copy of the result: of a million files it has 140 MB."""
    writer = _Writer(survey, form, device_table)
    writer.place()
    return writer.encode(), writer.devices.blobs


class _Writer:
    def __init__(self, survey: Survey, form: Form, device_table: bool) -> None:
        self.form = form
        self.survey, self.tree, self.xattrs = survey, survey.tree, survey.xattrs
        self.files = EncodedFiles() if form is Form.ENCODED else DecodedFiles()
        self.devices = Devices(form, list(survey.blobs), device_table)
        for node in survey.files:
            self.files.note(node)
        self.packed = self.files.plan(self.devices.blobs)
        self.formats = bytearray(len(self.tree.nodes) + 1)
        self.offsets = array("Q", bytes(8 * (len(self.tree.nodes) + 1)))
        self.data_blocks: dict[int, int] = {}  # number: first of its whole blocks, from the start of their area
        self.data_area = self.zero_block = self.shared_area = self.size = 0

    # Where everything goes.

    def place(self) -> None:
        position = devices_end(self.form, self.devices)
        whole_blocks = 0
        self.formats[:-1] = self.survey.extended
        for number, node in self.tree:
            try:
                head, layout, tail, blocks = self._measure(number, node)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.tree.path(node)}: {error}") from None
            if blocks:
                self.data_blocks[number] = whole_blocks
                whole_blocks += blocks
            position = self._put(number, position, head, layout, tail)
        if self.packed:
            body = index_size(self.packed)
            self.formats[-1] = on_disk.INODE_LAYOUT_EXTENDED
            position = self._put(-1, position, _EXTENDED_SIZE, on_disk.INODE_COMPRESSED_FULL, body)
        self.data_area = blocks_of(position)
        self.zero_block = self.data_area + whole_blocks
        self.shared_area = self.zero_block + self._needs_zero_frame()
        self.size = -(-((self.shared_area << BLOCK_BITS) + len(self.xattrs.area)) // ALIGNMENT) * ALIGNMENT
        self.devices.place(self.size >> BLOCK_BITS)
        self.files.place(self.devices.addresses, self.zero_block)

    def _needs_zero_frame(self) -> bool:
        return isinstance(self.files, EncodedFiles) and self.files.needs_zero_frame

    def _measure(self, number: int, node: Node) -> tuple[int, int, int, int]:
        """(bytes of inode and xattrs, data layout, bytes behind them, whole blocks elsewhere)."""
        head = self.survey.heads[number]
        if stat.S_ISREG(node.mode):
            return (head, *self.files.measure(node), 0)
        size = self.survey.flat_sizes[number]
        tail = size % BLOCK
        if tail and head + tail <= BLOCK:
            return head, INODE_FLAT_INLINE, tail, size >> BLOCK_BITS
        return head, INODE_FLAT_PLAIN, 0, blocks_of(size)

    def _put(self, number: int, position: int, head: int, layout: int, tail: int) -> int:
        start = -(-position >> ISLOT_BITS) << ISLOT_BITS
        if layout == INODE_FLAT_INLINE:
            # The tail may not cross a block; the kernel wants it in the block of the inode's last byte.
            if start % BLOCK + head + tail > BLOCK:
                start = -(-start >> BLOCK_BITS) << BLOCK_BITS
            end = start + head + tail
        else:
            end = start + head + (-head % 8 if tail else 0) + tail
        self.formats[number] |= layout << DATALAYOUT_BIT
        self.offsets[number] = start
        return end

    # The bytes.

    def encode(self) -> bytearray:
        image = bytearray(self.size)
        plain, short = self.survey.plain, self.files.short
        for number, node in self.tree:
            if plain[number] and (body := short(node)):
                self._write_short(image, number, node, *body)
            else:
                self._encode_node(image, number, node)
        if self.packed and isinstance(self.files, EncodedFiles):
            self._write_inode(image, -1, self.packed, 1, self.packed.size, b"", self.files.packed_body(self.packed))
        if self._needs_zero_frame():
            start = self.zero_block << BLOCK_BITS
            image[start : start + BLOCK] = zero_frame()
        start = self.shared_area << BLOCK_BITS
        image[start : start + len(self.xattrs.area)] = self.xattrs.area
        fields = Fields(
            inos=len(self.tree.nodes) + bool(self.packed),
            epoch=self.survey.epoch,
            fixed_nsec=self.survey.fixed_nsec,
            root_nid=self.offsets[0] >> ISLOT_BITS,
            packed_nid=self.offsets[-1] >> ISLOT_BITS,
            xattr_blkaddr=self.shared_area if self.xattrs.area else 0,
            fingerprints=self.survey.fingerprints,
        )
        write_head(image, self.form, fields, self.devices)
        return image

    def _encode_node(self, image: bytearray, number: int, node: Node) -> None:
        kind = node.mode & 0o170000
        xattrs = self.survey.attributes(node)
        if kind == stat.S_IFREG:
            self._write_inode(image, number, node, self.tree.nlink(number), node.size, xattrs, self.files.body(node))
        elif kind == stat.S_IFDIR:
            data, subdirectories = self._directory(number)
            self._write_flat(image, number, node, 2 + subdirectories, xattrs, data)
        elif kind == stat.S_IFLNK:
            self._write_flat(image, number, node, self.tree.nlink(number), xattrs, node.target)
        else:
            is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
            i_u = on_disk.encode_rdev(*node.rdev) if is_device else 0
            self._write_inode(image, number, node, self.tree.nlink(number), 0, xattrs, Body(i_u, b""))

    def _directory(self, number: int) -> tuple[bytes, int]:
        names, numbers, types = self.survey.listings[number]
        offsets = self.offsets
        nids = [offsets[each] >> ISLOT_BITS for each in numbers]
        return dirs.encode(names, nids, types), types.count(on_disk.FT_DIR) - 2

    def _write_flat(self, image: bytearray, number: int, node: Node, nlink: int, xattrs: bytes, data: bytes) -> None:
        """An inode whose data lies inline, in blocks of their own, or both."""
        start = self.data_area + self.data_blocks.get(number, 0)
        inline = self.formats[number] >> DATALAYOUT_BIT == INODE_FLAT_INLINE
        whole = len(data) & -BLOCK if inline else len(data)
        image[start << BLOCK_BITS : (start << BLOCK_BITS) + whole] = data[:whole]
        self._write_inode(image, number, node, nlink, len(data), xattrs, Body(start if whole else 0, data[whole:]))

    def _write_short(self, image: bytearray, number: int, node: Node, i_u: int, body: int) -> None:
        """A file without attributes whose body has 8 bytes: as `_write_inode` does it, in half the time."""
        offset, i_format, nlink = self.offsets[number], self.formats[number], self.tree.nlink(number)
        mode, size, uid, gid = node.mode, node.size, node.uid, node.gid
        if i_format & on_disk.INODE_LAYOUT_EXTENDED:
            uid, gid, mtime, nsec = uid & U32_MAX, gid & U32_MAX, node.mtime, node.mtime_nsec
            _pack_short_extended(image, offset, i_format, 0, mode, 0, size, i_u, 0, uid, gid, mtime, nsec, nlink, body)
        else:
            _pack_short_compact(image, offset, i_format, 0, mode, nlink, size, 0, i_u, 0, uid, gid, 0, body)

    def _write_inode(
        self, image: bytearray, number: int, node: Node, nlink: int, size: int, xattrs: bytes, body: Body
    ) -> None:
        offset, i_format = self.offsets[number], self.formats[number]
        i_u, data = body
        count = icount(xattrs) if xattrs else 0
        if i_format & on_disk.INODE_LAYOUT_EXTENDED:
            uid, gid = node.uid & U32_MAX, node.gid & U32_MAX
            _pack_extended(
                image, offset, i_format, count, node.mode, 0, size, i_u, 0, uid, gid, node.mtime, node.mtime_nsec, nlink
            )
            end = offset + _EXTENDED_SIZE
        else:
            _pack_compact(image, offset, i_format, count, node.mode, nlink, size, 0, i_u, 0, node.uid, node.gid, 0)
            end = offset + _COMPACT_SIZE
        if xattrs:
            image[end : end + len(xattrs)] = xattrs
            end += len(xattrs)
        if data:
            if i_format >> DATALAYOUT_BIT != INODE_FLAT_INLINE:
                end += -end % 8
            image[end : end + len(data)] = data
