"""Layers, one over the other → the tree that a container sees (OCI image-spec, "Applying changesets").

- A whiteout removes what lower layers have under its name, an opaque one what they have in its directory; neither
  touches what its own layer brings, wherever in the layer it stands.
- A later entry replaces an earlier one of the same name. A directory over a directory keeps the children.
- A path's parents are resolved as in a chroot: symlinks are followed and cannot leave the root. Parents that are
  missing are made: mode 0755, owner and time of the directory they are in.
- A hard link is another name of whatever its target is at that point, also in a lower layer; when that name is
  replaced later, the link keeps the old file.
- Content that a lower layer's blob holds is taken from there, so that it is fetched and cached once.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence

from erofs_builder.dedup import Deduplicator
from erofs_builder.errors import FormatError, UnsupportedError
from erofs_builder.layer import Entry, Layer
from erofs_builder.model import Node

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_SYMLINK_LIMIT = 40  # as the kernel
_DIRECTORY = stat.S_IFDIR | 0o755


def flatten(layers: Sequence[Layer], *, consume: bool = False) -> Node:
    """The root of the whole image. The layers' nodes are shared with the tree, never changed.

    `consume` takes the entries out of the layers on the way, a fifth of their memory: they cannot be used again.

    FormatError names an entry that cannot be applied: a hard link without target or to a directory, a parent that is
    no directory, a loop of symlinks.
    """
    tree = _Tree()
    for number, layer in enumerate(layers):
        tree.apply(_taken(layer.entries) if consume else layer.entries, lowest=number == 0)
    if len(layers) > 1:
        Deduplicator(layers).apply(tree.root)
    return tree.root


def _taken(entries: list[Entry]) -> Iterator[Entry]:
    entries.reverse()
    while entries:
        yield entries.pop()


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Every path and its node, parents first, names in byte order. The root is b""; hard links come under each name."""
    stack: list[tuple[bytes, Node]] = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if node.children:
            prefix = path + b"/" if path else b""
            stack.extend((prefix + name, node.children[name]) for name in sorted(node.children, reverse=True))


class _Tree:
    """The tree so far."""

    def __init__(self) -> None:
        self.root = Node(_DIRECTORY, children={})
        # Where the previous entries' parents are; emptied when a directory or symlink goes away.
        self._parents: dict[bytes, Node] = {}
        self._lowest = True
        self._brought: dict[Node, set[bytes]] = {}  # names that the current layer brings, per directory

    def apply(self, entries: Iterable[Entry], *, lowest: bool) -> None:
        """Apply one layer."""
        self._lowest = lowest
        self._brought = {}
        self._parents.clear()
        for entry in entries:
            try:
                self._apply(entry)
            except FormatError as error:
                raise type(error)(f"{_show(entry.path)}: {error}") from None

    def _apply(self, entry: Entry) -> None:
        parent_path, _, name = entry.path.rpartition(b"/")
        if not entry.path:
            if entry.node is not None and entry.node.is_dir:
                _take_over(self.root, entry.node)
            elif entry.node is not None:
                raise UnsupportedError("the root is not a directory")
            return
        if entry.node is None and entry.link is None:
            self._white_out(parent_path, name)
            return
        node = entry.node if entry.link is None else self._link_target(entry.link)
        assert node is not None
        parent = self._parent(parent_path)
        self._place(parent, name, node)

    def _place(self, parent: Node, name: bytes, node: Node) -> None:
        children = _children(parent)
        before = children.get(name)
        self._bring(parent, name)
        if node.children is not None:
            if before is not None and before.children is not None:
                _take_over(before, node)
                return
            node = node.copy()
            node.children = {}
        if before is not None and before is not node:
            self._forget(before)
        children[name] = node

    def _forget(self, gone: Node) -> None:
        if stat.S_IFMT(gone.mode) in (stat.S_IFDIR, stat.S_IFLNK):
            self._parents.clear()

    def _white_out(self, parent_path: bytes, name: bytes) -> None:
        opaque = name == _OPAQUE
        if self._lowest:
            return
        parent = self._find(parent_path)
        if parent is None or parent.children is None:
            return
        if opaque:
            for child in list(parent.children):
                self._remove_lower(parent, child)
        else:
            self._remove_lower(parent, name[len(_WHITEOUT) :])

    def _remove_lower(self, parent: Node, name: bytes) -> None:
        """Remove what lower layers have under a name; what the current layer brought stays."""
        stack = [(parent, name)]
        while stack:
            directory, child = stack.pop()
            children = _children(directory)
            node = children.get(child)
            if node is None:
                continue
            if child not in self._brought.get(directory, ()):
                self._forget(node)
                del children[child]
            elif node.children:
                stack.extend((node, grandchild) for grandchild in node.children)

    def _link_target(self, path: bytes) -> Node:
        parent_path, _, name = path.rpartition(b"/")
        parent = self._find(parent_path)
        node = parent.children.get(name) if parent is not None and parent.children is not None else None
        if node is None:
            raise FormatError(f"hard link to {_show(path)}, which does not exist")
        if node.is_dir:
            raise FormatError(f"hard link to {_show(path)}, which is a directory")
        return node

    def _parent(self, path: bytes) -> Node:
        parent = self._parents.get(path)
        if parent is None:
            parent = self._resolve(path, make=True)
            assert parent is not None
            if len(self._parents) > 4096:
                self._parents.clear()
            self._parents[path] = parent
        return parent

    def _find(self, path: bytes) -> Node | None:
        known = self._parents.get(path)
        return known if known is not None else self._resolve(path, make=False)

    def _resolve(self, path: bytes, *, make: bool) -> Node | None:
        """The directory that a path names, symlinks followed inside the root; made if missing, where asked for."""
        trail = [self.root]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                trail = trail[:-1] or trail
                continue
            directory = trail[-1]
            node = _children(directory).get(part)
            if node is None:
                if not make:
                    return None
                node = self._make_directory(directory, part)
            if stat.S_ISLNK(node.mode):
                links += 1
                if links > _SYMLINK_LIMIT:
                    raise FormatError("too many symlinks in its path")
                if node.target.startswith(b"/"):
                    trail = [self.root]
                todo.extend(node.target.split(b"/")[::-1])
            elif node.children is None:
                if not make:
                    return None
                raise FormatError(f"{_show(part)} in its path is not a directory")
            else:
                if make:
                    self._bring(directory, part)  # a whiteout of it must spare what is about to come
                trail.append(node)
        return trail[-1]

    def _make_directory(self, parent: Node, name: bytes) -> Node:
        node = Node(_DIRECTORY, parent.uid, parent.gid, parent.mtime, parent.mtime_nsec, children={})
        _children(parent)[name] = node
        return node

    def _bring(self, parent: Node, name: bytes) -> None:
        if not self._lowest:
            self._brought.setdefault(parent, set()).add(name)


def _take_over(directory: Node, newer: Node) -> None:
    """A directory entry over a directory: everything but the children is the newer one's."""
    directory.mode, directory.uid, directory.gid = newer.mode, newer.uid, newer.gid
    directory.mtime, directory.mtime_nsec = newer.mtime, newer.mtime_nsec
    directory.xattrs = newer.xattrs


def _children(node: Node) -> dict[bytes, Node]:
    if node.children is None:
        raise FormatError("not a directory")
    return node.children


def _show(path: bytes) -> str:
    return repr(path.decode(errors="surrogateescape"))[1:-1]
