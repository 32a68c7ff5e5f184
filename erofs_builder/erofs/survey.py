"""The writer's first pass, which both forms share: every inode of a tree, checked, and what depends on no form."""

from __future__ import annotations

import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from erofs_builder import fingerprint
from erofs_builder.erofs import dirs
from erofs_builder.erofs import layout as on_disk
from erofs_builder.erofs.layout import FILE_TYPES, U32_MAX
from erofs_builder.erofs.regular import check_extents
from erofs_builder.erofs.tree import Inventory
from erofs_builder.erofs.xattrs import XattrTable
from erofs_builder.errors import UnsupportedError
from erofs_builder.model import Blob, Node

_COMPACT_SIZE, _EXTENDED_SIZE = on_disk.INODE_COMPACT.size, on_disk.INODE_EXTENDED.size
_DISTINCT_MTIMES_MAX = 65536


def devices(root: Node, blobs: Iterable[Blob]) -> list[Blob]:
    """Those of `blobs` that files below `root` refer to, in the given order: that of the device slots."""
    used: set[Blob | None] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node.children:
            stack.extend(node.children.values())
        for extent in node.extents:
            used.add(extent.blob)
    return [blob for blob in dict.fromkeys(blobs) if blob in used]


class Listing(NamedTuple):
    """A directory's dirents, in their order: what they name, the numbers of those inodes, and their file types."""

    names: list[bytes]
    numbers: array[int]
    types: bytes


class Survey:
    """A tree's inodes by number (`tree`), and columns that go with them.

    `blobs` are those of the given ones that files refer to, in the given order; `files` all regular files.
    UnsupportedError names a path and what EROFS cannot express of it; ValueError is a tree that breaks the promises of
    model.Extent.
    """

    def __init__(self, root: Node, blobs: Sequence[Blob]) -> None:
        self.tree = Inventory(root)
        self.xattrs = XattrTable()
        self.files: list[Node] = []
        self.fingerprints = False
        mtimes: Counter[tuple[int, int]] = Counter()
        used: set[Blob] = set()
        for _, node in self.tree:
            try:
                self._check(node, used)
            except (UnsupportedError, ValueError) as error:
                raise type(error)(f"{self.tree.path(node)}: {error}") from None
            mtime = (node.mtime, node.mtime_nsec)
            if mtime in mtimes or len(mtimes) < _DISTINCT_MTIMES_MAX:
                mtimes[mtime] += 1
        if not used <= set(blobs):
            raise ValueError("a file refers to a blob that is not among the given ones")
        self.blobs = [blob for blob in dict.fromkeys(blobs) if blob in used]
        # Compact inodes have the superblock's mtime (kernels before 6.15 read no other), so take the most common one.
        self.epoch, self.fixed_nsec = min(mtimes, key=lambda mtime: (-mtimes[mtime], mtime))
        self.xattrs.layout()
        count = len(self.tree.nodes)
        self.extended = bytearray(count)  # whether the inode has 64 bytes
        self.heads = array("L", bytes(8 * count))  # bytes of the inode and its attributes
        self.plain = bytearray(count)  # whether it is a file of one extent in a blob, and has no attributes: nearly all
        self.listings: dict[int, Listing] = {}  # of directories
        self.flat_sizes = array("Q", bytes(8 * count))  # bytes of a directory's or symlink's data
        for number, node in self.tree:
            self._measure(number, node)

    def attributes(self, node: Node) -> bytes:
        """The bytes between an inode and its data."""
        return self.xattrs.body(node.xattrs, node.fingerprint) if node.xattrs or node.fingerprint else b""

    def _check(self, node: Node, used: set[Blob]) -> None:
        _check(node)
        if node.xattrs:
            self.xattrs.add(node.xattrs)
        if stat.S_ISREG(node.mode):
            check_extents(node)
            self.files.append(node)
            self.fingerprints |= bool(node.fingerprint)
            for extent in node.extents:
                if extent.blob is not None:
                    used.add(extent.blob)

    def _measure(self, number: int, node: Node) -> None:
        extended = self._is_extended(number, node)
        attributes = len(self.attributes(node)) if node.xattrs or node.fingerprint else 0
        self.extended[number] = extended
        self.heads[number] = (_EXTENDED_SIZE if extended else _COMPACT_SIZE) + attributes
        if len(node.extents) == 1:
            self.plain[number] = not attributes and node.extents[0].blob is not None
        elif node.children is not None:
            listing = self.listings[number] = self._listing(number, node.children)
            self.flat_sizes[number] = dirs.data_size(listing.names)
        elif node.target:
            self.flat_sizes[number] = len(node.target)

    def _listing(self, number: int, children: dict[bytes, Node]) -> Listing:
        nodes = self.tree.nodes
        named = {b".": nodes[number], b"..": nodes[self.tree.parents[number]], **children}
        names = dirs.sorted_names(children)
        found = [named[name] for name in names]
        numbers = array("L", [child.number for child in found])
        return Listing(names, numbers, bytes([FILE_TYPES[child.mode & 0o170000] for child in found]))

    def _is_extended(self, number: int, node: Node) -> bool:
        return (
            node.mtime != self.epoch
            or node.mtime_nsec != self.fixed_nsec
            or node.size > U32_MAX
            or not 0 <= node.uid <= 0xFFFF
            or not 0 <= node.gid <= 0xFFFF
            or (len(node.children) > 0xFFFD if node.children is not None else self.tree.nlink(number) > 0xFFFF)
        )


def _check(node: Node) -> None:
    kind = node.mode & 0o170000
    if kind not in FILE_TYPES or node.mode > 0xFFFF:
        raise UnsupportedError(f"mode {node.mode:o} is of no known file type")
    if node.fingerprint and (kind != stat.S_IFREG or not node.size or len(node.fingerprint) != fingerprint.SIZE):
        raise ValueError("only regular files that have bytes have fingerprints")
    if (kind == stat.S_IFDIR) != (node.children is not None):
        raise ValueError("directories, and only they, have children")
    if not -(1 << 63) <= node.mtime < 1 << 63 or not 0 <= node.mtime_nsec < 1_000_000_000:
        raise UnsupportedError(f"mtime {node.mtime}.{node.mtime_nsec:09} is beyond what EROFS can hold")
    if kind == stat.S_IFLNK and (not 0 < len(node.target) <= on_disk.SYMLINK_MAX or b"\0" in node.target):
        raise UnsupportedError(f"a symlink to {node.target[:100]!r} ({len(node.target)} bytes)")
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        major, minor = node.rdev
        if not 0 <= major < 1 << 12 or not 0 <= minor < 1 << 20:
            raise UnsupportedError(f"device number {major}:{minor} is beyond what Linux can hold")
