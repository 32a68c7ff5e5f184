"""What an image's tree says about which frames are read together. Hints only: they decide what is fetched, never what
is right.

A *group* is the run of frames that hold one large file. A *package* is the frames that hold one directory's modules: a
program that imports some of them mostly imports them all. A frame's *companions* hold the sources of the byte code that
it holds: a Python that checks byte code by its source's hash reads both. Both forms have the same frames and hints.

hints_codec.py has their bytes. The limits keep what a node does for one READ small, whoever wrote the hints.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from erofs_builder.digest import Digest
from erofs_builder.frames import FrameTable
from erofs_builder.model import Extent, Node

MAX_COMPANIONS = 3
MAX_PACKAGE = 16  # frames; of a larger directory (a standard library) little is needed
MOST_PACKAGES = 32  # that a frame may be in
OVERLAP = 4  # frames that all groups may name, for each frame of the blob
_MODULES = (b".pyc", b".js", b".mjs", b".cjs", b".rb", b".pm", b".lua", b".beam")
_CACHE = b"__pycache__"


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints about one blob, by frame number."""

    groups: dict[int, range] = field(default_factory=dict)
    companions: dict[int, tuple[int, ...]] = field(default_factory=dict)
    packages: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # the packages with files in a frame


NO_HINTS = Hints()


@dataclass(slots=True)
class _Found:
    """Of one blob."""

    groups: set[tuple[int, int]] = field(default_factory=set)  # first frame, frames
    packages: set[tuple[int, ...]] = field(default_factory=set)
    companions: dict[int, set[int]] = field(default_factory=dict)


def find_hints(root: Node, tables: Sequence[FrameTable]) -> list[Hints]:
    """Hints about the blobs with these tables, which hold the files of a tree."""
    found = {table.blob_digest: _Found() for table in tables}
    stack, seen = [root], {id(root)}
    while stack:
        children = stack.pop().children or {}
        for child in children.values():
            if child.children is None:
                if len(child.extents) > 1:
                    _add_group(found, child)
            elif id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
        _add_package(found, children)
        if (cache := children.get(_CACHE)) is not None and cache.children:
            _add_companions(found, cache.children, children)
    return [
        make_hints(
            _fewer_groups(each.groups, len(table)),
            _fewer_packages(each.packages),
            {frame: tuple(sorted(each.companions[frame])[:MAX_COMPANIONS]) for frame in sorted(each.companions)},
        )
        for each, table in ((found[table.blob_digest], table) for table in tables)
    ]


def _fewer_groups(groups: set[tuple[int, int]], frames: int) -> list[tuple[int, int]]:
    """As many as a blob of so many frames may have, sorted."""
    kept, left = [], OVERLAP * frames
    for group in sorted(groups):
        if group[1] <= left:
            kept.append(group)
            left -= group[1]
    return kept


def _fewer_packages(packages: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """As many as a frame may be in, small ones before large ones; sorted."""
    kept: list[tuple[int, ...]] = []
    count = Counter[int]()
    for package in sorted(packages, key=lambda package: (len(package), package)):
        if all(count[frame] < MOST_PACKAGES for frame in package):
            kept.append(package)
            count.update(package)
    return sorted(kept)


def make_hints(
    groups: Iterable[tuple[int, int]], packages: Iterable[tuple[int, ...]], companions: dict[int, tuple[int, ...]]
) -> Hints:
    """From groups (first frame, frames; a later one wins), packages, and companions by frame."""
    hints = Hints(companions=companions)
    for first, count in groups:
        group = range(first, first + count)
        hints.groups.update(dict.fromkeys(group, group))
    by_frame: dict[int, list[tuple[int, ...]]] = {}
    for package in packages:
        for frame in package:
            by_frame.setdefault(frame, []).append(package)
    hints.packages.update((frame, tuple(known)) for frame, known in by_frame.items())
    return hints


def _data(node: Node) -> list[Extent]:
    return [extent for extent in node.extents if extent.blob is not None] if stat.S_ISREG(node.mode) else []


def _add_group(found: dict[Digest, _Found], node: Node) -> None:
    extents = _data(node)
    if len(extents) < 2 or any(extent.blob is not extents[0].blob for extent in extents):
        return
    first, blob = extents[0].frame, extents[0].blob
    if blob is not None and all(extent.frame == first + number for number, extent in enumerate(extents)):
        found[blob.digest].groups.add((first, len(extents)))


def _add_package(found: dict[Digest, _Found], children: dict[bytes, Node]) -> None:
    frames: dict[Digest, set[int]] = {}
    for name, node in children.items():
        if name.endswith(_MODULES):
            for extent in _data(node):
                if extent.blob is not None:
                    frames.setdefault(extent.blob.digest, set()).add(extent.frame)
    for blob, package in frames.items():
        if 1 < len(package) <= MAX_PACKAGE:
            found[blob].packages.add(tuple(sorted(package)))


def _add_companions(found: dict[Digest, _Found], compiled: dict[bytes, Node], sources: dict[bytes, Node]) -> None:
    """Pair `__pycache__/NAME.cpython-311.pyc` with `NAME.py`, by the frames in which they begin."""
    for name, node in compiled.items():
        source = sources.get(name.split(b".")[0] + b".py")
        if not name.endswith(b".pyc") or source is None:
            continue
        byte_code, text = _data(node), _data(source)
        if not byte_code or not text or byte_code[0].blob is not text[0].blob or byte_code[0].blob is None:
            continue
        if text[0].frame != byte_code[0].frame:
            companions = found[byte_code[0].blob.digest].companions
            companions.setdefault(byte_code[0].frame, set()).add(text[0].frame)
