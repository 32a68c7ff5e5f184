"""What a tree of Nodes says, and what a directory on disk says, in one comparable shape."""

# Names in images are bytes, which pathlib does not take.
# ruff: noqa: PTH114, PTH115, PTH116, PTH118, PTH123

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from erofs_builder.layer import Layer, Options, build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.pieces import Base
from erofs_builder.tree import walk


class Seen(NamedTuple):
    """One path. `mtime` in nanoseconds; `first` is the first path of the same inode."""

    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    content: str
    rdev: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    first: bytes


def build(tar: bytes, *, base: Base | None = None, options: Options | None = None) -> tuple[Layer, bytes]:
    """A layer and its blob's bytes."""
    out = io.BytesIO()
    layer = build_layer(io.BytesIO(tar), out, base=base, options=options)
    return layer, out.getvalue()


def zstd_decode(blob: bytes) -> bytes:
    """What the zstd program makes of a blob."""
    return subprocess.run(["zstd", "-dcq"], input=blob, capture_output=True, check=True).stdout


def content(node: Node, decoded: Mapping[Blob, bytes]) -> bytes:
    """A file's bytes, read through its extents from the decoded blobs; holes are zeros."""
    parts = []
    for extent in node.extents:
        if extent.blob is None:
            parts.append(bytes(extent.length))
            continue
        assert extent.blob.table is not None
        start = extent.blob.table[extent.frame].decoded_offset + extent.frame_offset
        parts.append(decoded[extent.blob][start : start + extent.length])
    return b"".join(parts)


def decoded_blobs(layers: Sequence[tuple[Layer, bytes]]) -> dict[Blob, bytes]:
    """The decoded form of each layer's blob."""
    return {layer.blob: zstd_decode(blob) for layer, blob in layers if layer.blob is not None}


def see_nodes(root: Node, decoded: Mapping[Blob, bytes]) -> dict[bytes, Seen]:
    """Every path of a tree."""
    seen: dict[bytes, Seen] = {}
    first: dict[Node, bytes] = {}
    for path, node in walk(root):
        data = node.target
        if stat.S_ISREG(node.mode):
            data = content(node, decoded)
            assert len(data) == node.size
        seen[path] = Seen(
            node.mode,
            node.uid,
            node.gid,
            node.mtime * 1_000_000_000 + node.mtime_nsec,
            node.size,
            hashlib.sha256(data).hexdigest(),
            node.rdev,
            tuple(sorted(node.xattrs.items())),
            first.setdefault(node, path),
        )
    return seen


def see_disk(directory: Path) -> dict[bytes, Seen]:
    """Every path below a directory, in the same shape."""
    top = os.fsencode(directory)
    paths = [b""]
    for place, directories, files in os.walk(top):
        inside = os.path.relpath(place, top)
        prefix = b"" if inside == b"." else inside + b"/"
        paths += [prefix + name for name in directories + files]
    seen: dict[bytes, Seen] = {}
    first: dict[int, bytes] = {}
    for path in sorted(paths, key=lambda path: path.split(b"/")):
        seen[path] = _see(os.path.join(top, path) if path else top, path, first)
    return seen


def _see(place: bytes, path: bytes, first: dict[int, bytes]) -> Seen:
    status = os.lstat(place)
    mode = status.st_mode
    data = b""
    if stat.S_ISREG(mode):
        with open(place, "rb") as file:
            data = file.read()
    elif stat.S_ISLNK(mode):
        data = os.readlink(place)
    device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    names = sorted(os.fsencode(name) for name in os.listxattr(place, follow_symlinks=False))
    return Seen(
        mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_size if stat.S_ISREG(mode) else 0,
        hashlib.sha256(data).hexdigest(),
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0),
        tuple((name, os.getxattr(place, name, follow_symlinks=False)) for name in names),
        first.setdefault(status.st_ino, path),
    )
