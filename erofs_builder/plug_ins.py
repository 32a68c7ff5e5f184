"""What follows the first read of a plug-in: a module that a program loads while it runs needs libraries of its own.

An interpreter's extension modules (`….so` outside of the loader's directories) are not what its start needs by itself.
But once one is opened, the dynamic loader reads its symbols, writes to its data, and does the same with every library
that it needs: one wait after another, unless all of them are fetched at once. Which ones the module's file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from erofs_builder.followers import Follower
from erofs_builder.frame_list import Place
from erofs_builder.model import Blob, Node
from erofs_builder.startup import LIBRARY_DIRECTORIES, Start, frames_of
from erofs_builder.startup import Place as BlobPlace

MAX_MODULES = 256  # the largest ones
MAX_CLOSURE = 64  # libraries of one module
_SUFFIX = b".so"
_IGNORED = (b"-linux-gnu", b"/gconv")  # directories: the loader's own, and the C library's character sets


def plug_in_followers(start: Start, numbers: Mapping[Blob, int], known: Iterable[Place]) -> list[Follower]:
    """Followers of each module's first frame. `known`: the frames of the start, which are fetched in any case.

    Of a frame in which several modules begin, who reads it is not known: what all of them need follows.
    """
    found: dict[Place, set[Place]] = {}
    listed = set(known)
    for path, node in _modules(start.root):
        heads = [(numbers[blob], frame) for blob, frame in frames_of(node, 0, 1) if blob in numbers]
        if not heads or heads[0] in listed:
            continue
        try:
            places = {(numbers[blob], frame) for blob, frame in closure(start, path, node) if blob in numbers}
        except (OSError, KeyError):
            places = set()
        places -= listed | {heads[0]}
        found[heads[0]] = found.get(heads[0], places) & places
    return [Follower(place, (), sorted(others)) for place, others in sorted(found.items()) if others]


def _modules(root: Node) -> list[tuple[bytes, Node]]:
    """Plug-ins, ordered by where they lie, so that a frame is decoded once."""
    found: list[tuple[bytes, Node]] = []
    stack = [(b"", root)]
    while stack:
        directory, node = stack.pop()
        plug_ins = directory not in LIBRARY_DIRECTORIES and not directory.endswith(_IGNORED)
        for name, child in (node.children or {}).items():
            path = directory + b"/" + name
            if child.children is not None:
                stack.append((path, child))
            elif plug_ins and _SUFFIX in name and child.extents:
                found.append((path[1:], child))
    found.sort(key=lambda item: (-item[1].size, item[0]))
    del found[MAX_MODULES:]
    return sorted(found, key=lambda item: (item[1].extents[0].frame, item[0]))


def closure(start: Start, path: bytes, node: Node) -> Iterator[BlobPlace]:
    """What the loader touches of a module and the libraries that it needs."""
    pending, seen = [(path, node)], {id(node)}
    inherited: list[bytes] = []
    while pending:
        path, node = pending.pop(0)
        program = start.program(node)
        if program is None:
            continue
        for offset, length in program.touched:
            yield from frames_of(node, offset, length)
        inherited += start.search(path, program)
        for name in program.needed:
            library = start.library(name, inherited)
            if library is not None and id(library[1]) not in seen and len(seen) < MAX_CLOSURE:
                seen.add(id(library[1]))
                pending.append(library)
