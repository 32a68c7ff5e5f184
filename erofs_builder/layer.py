"""One layer: a tar stream in, a data blob out, and the ordered entries that `tree.flatten` applies."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple

from erofs_builder import tarstream
from erofs_builder.ahead import read_ahead
from erofs_builder.blob import DEFAULT_LEVEL, BlobWriter, Output
from erofs_builder.contents import Contents
from erofs_builder.decompress import Stream, plain_chunks
from erofs_builder.errors import FormatError, TarError, UnsupportedError
from erofs_builder.hot import Sha256
from erofs_builder.model import Blob, Node
from erofs_builder.packer import Packer
from erofs_builder.pieces import Base, FileRef
from erofs_builder.tarstream import TarEntry, TarReader

_NAME_LIMIT = 255
_PATH_LIMIT = 4095  # PATH_MAX: nothing could unpack or open it
_TARGET_LIMIT = 4095
_OWNER_MAX = 0xFFFFFFFF
_NO_DEVICE = (0, 0)
_TYPES = {
    tarstream.REGULAR: stat.S_IFREG,
    tarstream.SYMLINK: stat.S_IFLNK,
    tarstream.CHAR: stat.S_IFCHR,
    tarstream.BLOCK_DEVICE: stat.S_IFBLK,
    tarstream.DIRECTORY: stat.S_IFDIR,
    tarstream.FIFO: stat.S_IFIFO,
}
_EQUAL_LIMIT = 1 << 16
# An entry takes a kilobyte of tar, which compresses to nearly nothing, and about as much of our memory.
MAX_ENTRIES = 10_000_000
_WHITEOUT = b".wh."
# aufs' own bookkeeping (plnk, orph, aufs) is never part of the content.
_AUFS = re.compile(rb"(?:^|/)\.wh\.\.wh\.(?!\.opq\Z)")


@dataclass(slots=True)
class Options:
    """How a layer becomes a blob. Only `level` and `hard` decide the blob's bytes."""

    level: int = DEFAULT_LEVEL  # zstd
    hard: int = 0  # bytes of content that are compressed as small as they get before the level counts (blob.BlobWriter)
    threads: int = 2
    pool: Executor | None = None  # these threads compress, for several layers at once; it has `threads` of them
    fingerprints: int | None = None  # give files of this size and more their fingerprints


class Entry(NamedTuple):
    """One entry in the layer's order. Exactly one of node and link is set, neither for whiteouts.

    `path` has no `.`, `..`, empty or leading parts; b"" is the root. A whiteout's last part begins with `.wh.`.
    """

    path: bytes
    node: Node | None
    link: bytes | None = None  # a hard link: the path it is another name of


@dataclass(slots=True)
class Layer:
    """A layer, ready to be flattened with others. `blob` is None when it holds no file data of its own."""

    entries: list[Entry] = field(default_factory=list)
    blob: Blob | None = None
    contents: Contents = field(default_factory=Contents)  # what the blob holds


def build_layer(
    stream: Stream,
    blob_out: Output,
    *,
    base: Base | None = None,
    options: Options | None = None,
    whole: Sha256 | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Layer:
    """Read a layer (gzip, zstd or plain tar), write its blob to `blob_out`, and return its entries.

    The stream is read to its end, whatever lies behind the archive, by a thread of its own. `blob_out.write` gets the
    blob in order; nothing is written for a layer without file data. `base` maps content to pieces of blobs that exist
    elsewhere (`pieces.base_pieces`); those are left out here. `whole` takes in the plain tar: nearly free, as it goes
    beside the digests of pieces. `on_progress` is called with each entry's size.

    Raises TarError (malformed or cut off), UnsupportedError (what EROFS cannot hold).
    """
    options = options or Options()
    with (
        _writer(blob_out, options) as writer,
        read_ahead(plain_chunks(stream)) as chunks,
    ):
        packer = Packer(writer, base)
        reader = TarReader(chunks, whole)
        builder = LayerBuilder(packer, fingerprints=options.fingerprints)
        for count, entry in enumerate(reader):
            if count >= MAX_ENTRIES:
                raise UnsupportedError(f"more than {MAX_ENTRIES} entries in one layer")
            builder.add_tar(entry, reader)
            if on_progress:
                on_progress(entry.size)
        return builder.finish()


def _writer(out: Output, options: Options) -> BlobWriter:
    return BlobWriter(out, level=options.level, threads=options.threads, hard=options.hard, pool=options.pool)


class LayerBuilder:
    """Collects entries while their data go to the packer."""

    def __init__(self, packer: Packer, *, fingerprints: int | None = None) -> None:
        self._packer = packer
        self._fingerprints = fingerprints
        self._entries: list[Entry] = []
        self._files: list[Node] = []
        self._places: list[FileRef] = []
        self._equal: dict[int, int] = {}

    def add_tar(self, entry: TarEntry, reader: TarReader) -> None:
        """Take in one tar entry and its data."""
        path = clean_path(entry.name, entry.offset)
        whiteouts = _WHITEOUT in path
        if whiteouts and _AUFS.search(path):
            return
        if entry.kind == tarstream.HARD_LINK:
            self._entries.append(Entry(path, None, clean_path(entry.link, entry.offset)))
            return
        if whiteouts and path[path.rfind(b"/") + 1 :].startswith(_WHITEOUT):
            self._entries.append(Entry(path, None))
            return
        node = _node(entry, path)
        # Modes and times recur; a million nodes need not hold a million equal numbers.
        equal = self._equal
        node.mode = equal.setdefault(node.mode, node.mode)
        if len(equal) < _EQUAL_LIMIT:
            node.mtime = equal.setdefault(node.mtime, node.mtime)
        if entry.kind == tarstream.REGULAR:
            file = self._packer.store(
                path, entry.size, reader.peek(8), reader.read, entry.segments, entry.digest, reader.sha256_many
            )
            self.add_file(path, node, file)
        else:
            self.add(path, node)

    def add(self, path: bytes, node: Node) -> None:
        """Append an entry without data."""
        self._entries.append(Entry(path, node))

    def add_link(self, path: bytes, target: bytes) -> None:
        """Append a hard link to an earlier path."""
        self._entries.append(Entry(path, None, target))

    def add_file(self, path: bytes, node: Node, file: FileRef) -> None:
        """Append a regular file whose data the packer holds."""
        self._entries.append(Entry(path, node))
        self._files.append(node)
        self._places.append(file)

    def finish(self) -> Layer:
        """Complete the blob and give every file its extents."""
        table = self._packer.finish()
        blob = Blob(table) if table else None
        locate = self._packer.pieces.locate(blob or Blob())
        for node, file in zip(self._files, self._places, strict=True):
            node.extents = locate(file, node.size)
            if self._fingerprints is not None and node.size >= self._fingerprints:
                node.fingerprint = self._packer.pieces.fingerprint(file, node.size)
        return Layer(self._entries, blob, self._packer.pieces.contents())


def clean_path(name: bytes, offset: int = 0) -> bytes:
    """A tar name as a path below the root: `.`, `..` and slashes resolved lexically, never above it.

    UnsupportedError for parts that are longer than a file name can be, TarError for NULs.
    """
    if b"\0" in name:
        raise TarError(f"tar: a name with a NUL byte: {name[:100]!r} (entry at offset {offset})")
    if len(name) > _PATH_LIMIT:
        raise UnsupportedError(f"a path of {len(name)} bytes: {name[:100]!r}… (entry at offset {offset})")
    if name[:2] == b"./":
        name = name[2:]
    if len(name) <= _NAME_LIMIT and b"/." not in name and b"//" not in name and name[:1] not in b"./":
        return name[:-1] if name[-1:] == b"/" else name  # nearly all names
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part and part != b".":
            parts.append(part)
            if len(part) > _NAME_LIMIT:
                raise UnsupportedError(f"a name of {len(part)} bytes: {name[:100]!r}… (entry at offset {offset})")
    return b"/".join(parts)


def _node(entry: TarEntry, path: bytes) -> Node:
    kind, uid, gid = entry.kind, entry.uid, entry.gid
    if not (0 <= uid <= _OWNER_MAX and 0 <= gid <= _OWNER_MAX):
        uid, gid = owner_id(uid, "uid", path), owner_id(gid, "gid", path)
    mode = _TYPES[kind] | entry.mode
    node = Node(mode, uid, gid, entry.mtime, entry.mtime_nsec, entry.size, (), b"", _NO_DEVICE, entry.xattrs)
    if kind == tarstream.REGULAR:
        return node
    if kind == tarstream.DIRECTORY:
        node.children = {}
    elif kind == tarstream.SYMLINK:
        node.target = entry.link
        node.mode = stat.S_IFLNK | 0o777  # Linux knows no other, whatever an archive says
        if not 1 <= len(entry.link) <= _TARGET_LIMIT or b"\0" in entry.link:
            raise UnsupportedError(f"{_show(path)}: a symlink target of {len(entry.link)} bytes, or with a NUL byte")
    elif kind in (tarstream.CHAR, tarstream.BLOCK_DEVICE):
        major, minor = entry.rdev
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise UnsupportedError(f"{_show(path)}: device number {major}:{minor} is out of range")
        node.rdev = entry.rdev
    return node


def owner_id(number: int, what: str, path: bytes) -> int:
    """A user or group id as the kernel keeps it: 32 bits; negative ones wrap, as they do in chown(2)."""
    if not -(1 << 31) <= number < 1 << 32:
        raise UnsupportedError(f"{_show(path)}: {what} {number} does not fit 32 bits")
    return number & _OWNER_MAX


def _show(path: bytes) -> str:
    return repr(path.decode(errors="surrogateescape"))[1:-1]


__all__ = ["Entry", "FormatError", "Layer", "LayerBuilder", "Options", "build_layer", "clean_path", "owner_id"]
