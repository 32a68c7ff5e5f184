"""Paths in a tree of nodes, looked up as a process whose root is that tree would."""

from __future__ import annotations

import stat

from erofs_builder.model import Node

MAX_LINKS = 40  # as Linux


def split(path: bytes) -> list[bytes]:
    """A path's names, without empty ones and `.`."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def lookup(root: Node, path: bytes) -> tuple[bytes, Node] | None:
    """The node at a path and its path without symbolic links, which are followed; None if there is none."""
    pending = split(path)[::-1]
    walked: list[tuple[bytes, Node]] = [(b"", root)]
    links = 0
    while pending:
        name = pending.pop()
        if name == b"..":
            walked = walked[:-1] or [(b"", root)]
            continue
        node = (walked[-1][1].children or {}).get(name)
        if node is None:
            return None
        if not stat.S_ISLNK(node.mode):
            walked.append((name, node))
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        pending.extend(split(node.target)[::-1])
        if node.target.startswith(b"/"):
            walked = [(b"", root)]
    return b"/".join(name for name, _ in walked[1:]), walked[-1][1]
