"""`rootfs:DIR`: a directory on disk as one layer, without a tar in between; in byte order, so deterministic."""

# Names in images are bytes, which pathlib does not take.
# ruff: noqa: PTH115, PTH116

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from erofs_builder.blob import BlobWriter, Output
from erofs_builder.errors import FormatError
from erofs_builder.layer import Layer, LayerBuilder, Options
from erofs_builder.model import Node
from erofs_builder.packer import Packer
from erofs_builder.pax import Segments
from erofs_builder.pieces import Base

# Labels of the running system, not of the image. (ACLs and capabilities are xattrs too, and kept.)
_SKIPPED_XATTRS = (b"security.selinux", b"security.ima", b"security.evm", b"system.nfs4_acl", b"btrfs.")


def build_rootfs(
    directory: str | os.PathLike[str],
    blob_out: Output,
    *,
    base: Base | None = None,
    options: Options | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Layer:
    """Walk a directory into one layer, as `layer.build_layer` does with a tar; its root is the image's root.

    Symlinks are never followed; other file systems mounted below are not left out. FormatError names a file that
    changes while it is read, OSError what cannot be read. Sockets are kept.
    """
    options = options or Options()
    with BlobWriter(blob_out, level=options.level, threads=options.threads, hard=options.hard) as writer:
        packer = Packer(writer, base)
        builder = LayerBuilder(packer, fingerprints=options.fingerprints)
        walk = _Walk(builder, packer, on_progress)
        walk.directory(os.fsencode(Path(directory)), b"")
        return walk.builder.finish()


class _Walk:
    """The state of one walk: which inodes have been seen, under which path."""

    def __init__(self, builder: LayerBuilder, packer: Packer, on_progress: Callable[[int], None] | None) -> None:
        self.builder = builder
        self._packer = packer
        self._on_progress = on_progress
        self._seen: dict[tuple[int, int], bytes] = {}

    def directory(self, source: bytes, path: bytes) -> None:
        """Add a directory and everything below it."""
        todo = [(source, path)]
        while todo:
            place, name = todo.pop()
            self.builder.add(name, _node(place, os.stat(place, follow_symlinks=not name)))
            below: list[tuple[bytes, bytes]] = []
            for child in sorted(os.scandir(place), key=lambda entry: entry.name):
                child_path = name + b"/" + child.name if name else child.name
                if child.is_dir(follow_symlinks=False):
                    below.append((child.path, child_path))
                else:
                    self._other(child.path, child_path, child.stat(follow_symlinks=False))
            todo += reversed(below)

    def _other(self, place: bytes, path: bytes, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            first = self._seen.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                self.builder.add_link(path, first)
                return
        node = _node(place, status)
        if not stat.S_ISREG(status.st_mode):
            self.builder.add(path, node)
            return
        self._file(place, path, node)
        if self._on_progress:
            self._on_progress(node.size)

    def _file(self, place: bytes, path: bytes, node: Node) -> None:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            segments = data_segments(descriptor, node.size)
            reader = _SegmentReader(descriptor, place, segments or ((0, node.size),))
            head = os.pread(descriptor, 8, segments[0][0] if segments else 0)
            self.builder.add_file(path, node, self._packer.store(path, node.size, head, reader.read, segments))
        finally:
            os.close(descriptor)


class _SegmentReader:
    """Reads a file's data segments one behind the other, as a tar stores them."""

    def __init__(self, descriptor: int, place: bytes, segments: Segments) -> None:
        self._descriptor = descriptor
        self._place = place
        self._segments = iter(segments)
        self._offset = self._left = 0

    def read(self, size: int) -> bytes:
        """The next `size` stored bytes."""
        parts: list[bytes] = []
        while size:
            if not self._left:
                self._offset, self._left = next(self._segments)
            part = os.pread(self._descriptor, min(size, self._left), self._offset)
            if not part:
                raise FormatError(f"{os.fsdecode(self._place)}: became shorter while it was read")
            parts.append(part)
            self._offset += len(part)
            self._left -= len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def data_segments(descriptor: int, size: int) -> Segments | None:
    """Where a file has data, by SEEK_DATA and SEEK_HOLE; None when it has no holes."""
    segments: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        if start >= size:
            break
        segments.append((start, end - start))
        at = end
    return None if segments == [(0, size)] or size == 0 else tuple(segments)


def _node(place: bytes, status: os.stat_result) -> Node:
    mode = status.st_mode
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    node = Node(mode, status.st_uid, status.st_gid, seconds, nanoseconds, xattrs=_xattrs(place))
    if stat.S_ISREG(mode):
        node.size = status.st_size
    elif stat.S_ISDIR(mode):
        node.children = {}
    elif stat.S_ISLNK(mode):
        node.target = os.readlink(place)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        node.rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return node


def _xattrs(place: bytes) -> dict[bytes, bytes]:
    try:
        names = [os.fsencode(name) for name in os.listxattr(place, follow_symlinks=False)]
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return {}
        raise
    return {
        name: os.getxattr(place, name, follow_symlinks=False)
        for name in sorted(names)
        if not name.startswith(_SKIPPED_XATTRS)
    }
