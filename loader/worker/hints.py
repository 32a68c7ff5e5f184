"""What an image's tree says about which frames are read together. Hints only: they decide what is fetched, never what
is right.

A *group* is the run of frames that hold one large file. A *package* is the frames that hold one directory's modules: a
program that imports some of them mostly imports them all. A frame's *companions* hold the sources of the byte code that
it holds: a Python that checks byte code by its source's hash reads both. Both forms have the same frames and hints.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from erofs_builder.digest import Digest
from erofs_builder.erofs.reader import Reader
from erofs_builder.model import Extent, Node
from erofs_builder.payload import Payload

MAX_INODES = 200_000  # above this, walking the tree costs more than the hints save
MAX_COMPANIONS = 3
MAX_PACKAGE = 16  # frames; of a larger directory (a standard library) little is needed
_MODULES = (b".pyc", b".js", b".mjs", b".cjs", b".rb", b".pm", b".lua", b".beam")
_CACHE = b"__pycache__"


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints about one blob, by frame number."""

    groups: dict[int, range] = field(default_factory=dict)
    companions: dict[int, tuple[int, ...]] = field(default_factory=dict)
    packages: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # the packages with files in a frame


NO_HINTS = Hints()


def hints_of(payload: Payload) -> dict[Digest, Hints]:
    """Hints about each blob of an image; none for a very large one."""
    reader = Reader(payload.erofs, payload.tables, payload.form)
    if reader.superblock.inos > MAX_INODES:
        return {}
    hints = {table.blob_digest: Hints() for table in payload.tables}
    stack = [reader.read_tree()]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        children = node.children or {}
        stack.extend(child for child in children.values() if child.is_dir)
        for child in children.values():
            _add_group(hints, child)
        _add_package(hints, children)
        if (cache := children.get(_CACHE)) is not None and cache.children:
            _add_companions(hints, cache.children, children)
    return hints


def _data(node: Node) -> list[Extent]:
    return [extent for extent in node.extents if extent.blob is not None] if stat.S_ISREG(node.mode) else []


def _add_group(hints: dict[Digest, Hints], node: Node) -> None:
    extents = _data(node)
    if len(extents) < 2 or any(extent.blob is not extents[0].blob for extent in extents):
        return
    first = extents[0].frame
    group = range(first, first + len(extents))
    if extents[0].blob is not None and [extent.frame for extent in extents] == list(group):
        hints[extents[0].blob.digest].groups.update(dict.fromkeys(group, group))


def _add_package(hints: dict[Digest, Hints], children: dict[bytes, Node]) -> None:
    frames: dict[Digest, dict[int, None]] = {}
    for name, node in children.items():
        if name.endswith(_MODULES):
            for extent in _data(node):
                if extent.blob is not None:
                    frames.setdefault(extent.blob.digest, {})[extent.frame] = None
    for blob, found in frames.items():
        if 1 < len(found) <= MAX_PACKAGE:
            packages = hints[blob].packages
            for frame in found:
                packages[frame] = (*packages.get(frame, ()), tuple(found))


def _add_companions(hints: dict[Digest, Hints], compiled: dict[bytes, Node], sources: dict[bytes, Node]) -> None:
    """Pair `__pycache__/NAME.cpython-311.pyc` with `NAME.py`, by the frames in which they begin."""
    for name, node in compiled.items():
        source = sources.get(name.split(b".")[0] + b".py")
        if not name.endswith(b".pyc") or source is None:
            continue
        byte_code, text = _data(node), _data(source)
        if not byte_code or not text or byte_code[0].blob is not text[0].blob or byte_code[0].blob is None:
            continue
        companions = hints[byte_code[0].blob.digest].companions
        known = companions.get(byte_code[0].frame, ())
        if text[0].frame not in known and len(known) < MAX_COMPANIONS and text[0].frame != byte_code[0].frame:
            companions[byte_code[0].frame] = (*known, text[0].frame)
