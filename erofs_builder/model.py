"""What the builder's stages hand to each other: blobs, extents of files in them, and the tree of nodes.

layer tar ─▶ blob.py + layer.py ─▶ Blob, LayerTree of Nodes ─▶ tree.py (flatten) ─▶ Node (root) ─▶ erofs/writer.py
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from erofs_builder.digest import Digest
from erofs_builder.frames import FrameTable


@dataclass(slots=True, eq=False)
class Blob:
    """A data blob, compared by identity while it is written; `table` (so the digest) is there once it is complete."""

    table: FrameTable | None = None
    from_base: bool = False  # it belongs to the `--base` artifact and was not written by this run

    @property
    def digest(self) -> Digest:
        if self.table is None:
            raise ValueError("this blob is not complete yet")
        return self.table.blob_digest


class Extent(NamedTuple):
    """A run of a file's bytes inside one frame of a blob, or a hole (blob None). Extents follow without gaps.

    A file's bytes are either one extent anywhere in a frame at a multiple of 4 KiB (packed with other files), or
    several that each start their frame (frame_offset 0) and, but for the last, have a length that is a multiple of
    4 KiB. An extent of one block, unless it is a file's last one, lies in a frame that takes one block encoded; and no
    frame takes more than one block encoded for one block of content (the kernel's index has no way to say either).
    """

    blob: Blob | None
    frame: int
    frame_offset: int
    length: int


@dataclass(slots=True, eq=False)
class Node:
    """A file system object. A hard link is the same Node under several names (the writer counts them)."""

    mode: int  # st_mode: type and permission bits
    uid: int = 0
    gid: int = 0
    mtime: int = 0  # seconds, may be negative
    mtime_nsec: int = 0
    size: int = 0  # regular files
    extents: tuple[Extent, ...] = ()
    target: bytes = b""  # symlinks
    rdev: tuple[int, int] = (0, 0)  # major, minor of devices
    xattrs: dict[bytes, bytes] = field(default_factory=dict)  # full names, e.g. b"security.capability"
    fingerprint: bytes = b""  # of a regular file's bytes (fingerprint.py), where the image is to carry them
    children: dict[bytes, Node] | None = None  # directories
    number: int = field(default=-1, init=False, repr=False)  # in the inventory that was made last (erofs/tree.py)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def copy(self) -> Node:
        """Another node that says the same; a tenth of the time of dataclasses.replace."""
        return Node(
            self.mode,
            self.uid,
            self.gid,
            self.mtime,
            self.mtime_nsec,
            self.size,
            self.extents,
            self.target,
            self.rdev,
            self.xattrs,
            self.fingerprint,
            self.children,
        )


def replace_extents(root: Node, extents_of: Callable[[Node], tuple[Extent, ...]]) -> None:
    """Replace the files below `root` whose bytes are to lie elsewhere; hard links stay one node.

    The nodes that were there are not changed: their layer holds them too.
    """
    replaced: dict[Node, Node] = {}
    stack = [root]
    while stack:
        children = stack.pop().children or {}
        for name, node in children.items():
            if node.children is not None:
                stack.append(node)
            elif node.extents:
                extents = extents_of(node)
                if extents is node.extents or extents == node.extents:
                    continue  # nearly all
                changed = replaced.get(node)
                if changed is None:
                    changed = replaced[node] = node.copy()
                    changed.extents = extents
                children[name] = changed
