"""A directory on disk as a Node tree over sample blobs: what tests feed to the EROFS writer."""

# Paths are bytes here, so that names that are not UTF-8 stay what they are; pathlib has no such paths.
# ruff: noqa: PTH115, PTH118, PTH208

from __future__ import annotations

import os
import stat
from pathlib import Path

from erofs_builder.model import Node
from tests.support.sample_blobs import FRAME, SampleBlob


def walk(directory: Path, sample: SampleBlob) -> Node:
    """Read a tree; small files are packed, others get frames of their own. Hard links become one Node."""
    seen: dict[int, Node] = {}
    root = _node(os.fsencode(directory), sample, seen)
    pending = [(os.fsencode(directory), root)]
    while pending:
        path, node = pending.pop()
        assert node.children is not None
        for name in sorted(os.listdir(path)):
            child = _node(os.path.join(path, name), sample, seen)
            node.children[name] = child
            if child.is_dir:
                pending.append((os.path.join(path, name), child))
    return root


def _node(path: bytes, sample: SampleBlob, seen: dict[int, Node]) -> Node:
    status = os.lstat(path)
    if status.st_ino in seen:
        return seen[status.st_ino]
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    node = Node(status.st_mode, status.st_uid, status.st_gid, seconds, nanoseconds)
    for name in os.listxattr(path, follow_symlinks=False):
        node.xattrs[os.fsencode(name)] = os.getxattr(path, name, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        node.children = {}
        return node
    seen[status.st_ino] = node
    if stat.S_ISLNK(status.st_mode):
        node.target = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = Path(os.fsdecode(path)).read_bytes()
        node.size = len(content)
        if content:
            node.extents = sample.add_packed(content) if len(content) < FRAME // 2 else sample.add_frames(content)
    else:
        node.rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return node
