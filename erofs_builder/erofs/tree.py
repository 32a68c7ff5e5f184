"""The order of inodes: every directory's children one after the other, in the order of its dirents.

So nids grow by small steps along a directory, which compresses well, and a directory's inodes share blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from erofs_builder.erofs import dirs
from erofs_builder.errors import UnsupportedError
from erofs_builder.model import Node


class Inventory:
    """All inodes of a tree, numbered from 0 (the root). It holds until another one is made of some of its nodes."""

    def __init__(self, root: Node) -> None:
        if not root.is_dir:
            raise UnsupportedError("the root of an image must be a directory")
        self.root = root
        self.nodes: list[Node] = [root]
        self.parents = array("L", [0])  # of directories; of the first name for others
        self.extra_links: dict[int, int] = {}  # number: names beyond the first one
        root.number = 0  # in the node itself: a dictionary of a million would take 70 MB
        self._collect()

    def number(self, node: Node) -> int:
        """A node's place in `nodes`."""
        return node.number

    def nlink(self, number: int) -> int:
        """Link count of what is not a directory."""
        return 1 + self.extra_links.get(number, 0)

    def _collect(self) -> None:
        pending = [0]
        while pending:
            parent = pending.pop()
            children = self.nodes[parent].children or {}
            try:
                dirs.check_names(children)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.path(self.nodes[parent])}: {error}") from None
            subdirectories = []
            for name in sorted(children):
                child = children[name]
                number = child.number
                if 0 <= number < len(self.nodes) and self.nodes[number] is child:
                    if child.is_dir:
                        raise UnsupportedError(f"{self.path(child)}: a directory cannot have two names")
                    self.extra_links[number] = self.extra_links.get(number, 0) + 1
                    continue
                number = child.number = len(self.nodes)
                self.nodes.append(child)
                self.parents.append(parent)
                if child.is_dir:
                    subdirectories.append(number)
            pending += reversed(subdirectories)

    def path(self, node: Node) -> str:
        """A path of a node, for messages; undecodable bytes are shown escaped."""
        parts: list[bytes] = []
        number = node.number
        while number:
            parent = self.nodes[self.parents[number]]
            child = self.nodes[number]
            parts.append(next(name for name, other in (parent.children or {}).items() if other is child))
            number = self.parents[number]
        return "/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")

    def __iter__(self) -> Iterator[tuple[int, Node]]:
        return enumerate(self.nodes)
