"""What an artifact holds: its tree, read back from the metadata, and sums over it."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from erofs_builder.erofs.reader import Reader
from erofs_builder.frames import FrameTable
from erofs_builder.model import Blob, Node
from erofs_builder.payload import Form, Payload
from erofs_builder.tree import walk
from loader.artifact import Artifact
from loader.convert.load import load_payload
from loader.errors import NotFoundError
from loader.registry.base import ImageSource

KINDS = {
    stat.S_IFREG: "files",
    stat.S_IFDIR: "directories",
    stat.S_IFLNK: "symlinks",
    stat.S_IFCHR: "devices",
    stat.S_IFBLK: "devices",
    stat.S_IFIFO: "fifos",
    stat.S_IFSOCK: "sockets",
}


@dataclass(frozen=True, slots=True)
class Tree:
    """One form's payload and the tree in it. `blobs` are the model's, in device order."""

    payload: Payload
    root: Node
    blobs: tuple[Blob, ...]


@dataclass(slots=True)
class BlobUse:
    """How much of a blob the tree refers to, and from how many files."""

    table: FrameTable
    files: int = 0
    bytes: int = 0  # each place counted once
    shared: int = 0  # bytes that are referred to again


@dataclass(slots=True)
class Survey:
    """Sums over a tree. A hard-linked inode counts once, its names in `names`."""

    kinds: Counter[str] = field(default_factory=Counter)
    names: int = 0
    file_bytes: int = 0
    hole_bytes: int = 0
    xattrs: int = 0
    fingerprints: int = 0
    blobs: list[BlobUse] = field(default_factory=list)
    largest: list[tuple[int, bytes]] = field(default_factory=list)  # (size, path), the largest first

    @property
    def inodes(self) -> int:
        return sum(self.kinds.values())


def some_form(artifact: Artifact) -> Form:
    """A form that the artifact has; NotFoundError if it has none."""
    for form in Form:
        if form in artifact.metadata:
            return form
    raise NotFoundError("the artifact has no metadata of any form")


def load_tree(source: ImageSource, artifact: Artifact, form: Form | None = None) -> Tree:
    """The tree of one form (default: whichever there is)."""
    payload = load_payload(source, artifact, form or some_form(artifact))
    reader = Reader(payload.erofs, payload.tables, payload.form)
    return Tree(payload, reader.read_tree(), tuple(reader.blobs))


def survey(tree: Tree, top: int) -> Survey:
    """Sums over a tree, and its `top` largest files."""
    result = Survey()
    uses = {blob: BlobUse(blob.table) for blob in tree.blobs if blob.table is not None}
    result.blobs = list(uses.values())
    places: dict[Blob, set[tuple[int, int]]] = {blob: set() for blob in uses}
    sizes: list[tuple[int, bytes]] = []
    for path, node in inodes(tree.root, result):
        result.kinds[KINDS[stat.S_IFMT(node.mode)]] += 1
        result.xattrs += len(node.xattrs)
        if stat.S_ISREG(node.mode):
            result.file_bytes += node.size
            result.fingerprints += bool(node.fingerprint)
            sizes.append((node.size, path))
            _count_extents(node, result, uses, places)
    result.largest = sorted(sizes, key=lambda item: (-item[0], item[1]))[:top]
    return result


def inodes(root: Node, result: Survey | None = None) -> Iterator[tuple[bytes, Node]]:
    """Every inode once, with its first path; counts all names in `result`."""
    seen: set[int] = set()
    for path, node in walk(root):
        if result is not None:
            result.names += 1
        if id(node) not in seen:
            seen.add(id(node))
            yield path, node


def _count_extents(
    node: Node, result: Survey, uses: dict[Blob, BlobUse], places: dict[Blob, set[tuple[int, int]]]
) -> None:
    for blob in {extent.blob for extent in node.extents if extent.blob is not None}:
        uses[blob].files += 1
    for extent in node.extents:
        if extent.blob is None:
            result.hole_bytes += extent.length
            continue
        place = (extent.frame, extent.frame_offset)
        if place in places[extent.blob]:
            uses[extent.blob].shared += extent.length
        else:
            places[extent.blob].add(place)
            uses[extent.blob].bytes += extent.length


def show_path(path: bytes) -> str:
    """An absolute path that a terminal can take: bytes that are no printable UTF-8 as \\xNN."""
    text = (b"/" + path).decode(errors="surrogateescape")
    return "".join(
        character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in _bytes_of(character))
        for character in text
    )


def _bytes_of(character: str) -> bytes:
    return character.encode(errors="surrogateescape")
