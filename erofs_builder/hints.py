"""What an image's tree says about which frames are read together. Hints only: they decide what is fetched, never what
is right.

A *group* is the run of frames that hold one large file. A *package* is the frames that hold one directory's modules: a
program that imports some of them mostly imports them all. A frame's *companions* hold the sources of the byte code that
it holds: a Python that checks byte code by its source's hash reads both. Both forms have the same frames and hints.

In a metadata payload: a byte of version, 1, and for each blob, in the order of the device slots, three lists, each with
its length before it. All numbers are LEB128 of at most 32 bits. What is sorted ascends: nothing is there twice.

    groups       first frame less the one before, frames; sorted
    packages     number of frames, then each less the one before; sorted
    companions   frame less the one before, number of companions, each less its frame as a zigzag number; sorted

Limits keep what a node does for one READ small, whoever wrote the hints.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.frames import FrameTable
from erofs_builder.model import Extent, Node

MAX_COMPANIONS = 3
MAX_PACKAGE = 16  # frames; of a larger directory (a standard library) little is needed
_VERSION = 1
MOST_PACKAGES = 32  # that a frame may be in
_OVERLAP = 4  # frames that all groups may name, for each frame of the blob
_MOST_BYTES = 16  # for each frame of all blobs
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
        _hints(
            _fewer_groups(each.groups, len(table)),
            _fewer_packages(each.packages),
            {frame: tuple(sorted(each.companions[frame])[:MAX_COMPANIONS]) for frame in sorted(each.companions)},
        )
        for each, table in ((found[table.blob_digest], table) for table in tables)
    ]


def _fewer_groups(groups: set[tuple[int, int]], frames: int) -> list[tuple[int, int]]:
    """As many as a blob of so many frames may have, sorted."""
    kept, left = [], _OVERLAP * frames
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


def _hints(
    groups: Iterable[tuple[int, int]], packages: Iterable[tuple[int, ...]], companions: dict[int, tuple[int, ...]]
) -> Hints:
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


def encode_hints(hints: Sequence[Hints], tables: Sequence[FrameTable]) -> bytes:
    """Hints about the blobs with these tables, in the order of the device slots; empty if they would be too large."""
    numbers = [_VERSION]
    for each in hints:
        groups = sorted({(group.start, len(group)) for group in each.groups.values()})
        packages = sorted({package for known in each.packages.values() for package in known})
        numbers += [len(groups), *_flat(groups)]
        numbers.append(len(packages))
        for package in packages:
            numbers += [len(package), *_steps(package)]
        numbers.append(len(each.companions))
        frames = sorted(each.companions)
        for frame, step in zip(frames, _steps(frames), strict=True):
            others = each.companions[frame]
            numbers += [step, len(others), *(_zigzag(other - frame) for other in others)]
    data = b"".join(map(_leb128, numbers))
    return data if len(data) <= _most_bytes(tables) else b""


def _most_bytes(tables: Sequence[FrameTable]) -> int:
    return 1 + sum(3 + _MOST_BYTES * len(table) for table in tables)


def decode_hints(data: bytes, tables: Sequence[FrameTable]) -> list[Hints]:
    """Hints about the blobs with these tables; ArtifactError for what is malformed, or names no frame of theirs."""
    if data[:1] != bytes((_VERSION,)):
        raise ArtifactError(f"hints: unknown version {data[:1].hex() or 'none'}")
    if len(data) > _most_bytes(tables):
        raise ArtifactError(f"hints: {len(data)} bytes where {_most_bytes(tables)} are possible")
    reader = _Numbers(data)
    reader.next()
    hints = [_decode_blob(reader, len(table)) for table in tables]
    reader.end()
    return hints


def _decode_blob(reader: _Numbers, frames: int) -> Hints:
    groups = _decode_groups(reader, frames)
    packages = [
        _ascending(reader, reader.next(MAX_PACKAGE), frames) for _ in range(reader.next(frames * MOST_PACKAGES))
    ]
    if any(before >= after for before, after in pairwise(packages)) or any(len(package) < 2 for package in packages):
        raise ArtifactError("hints: packages are not sorted, or one is of one frame")
    if any(count > MOST_PACKAGES for count in Counter(chain.from_iterable(packages)).values()):
        raise ArtifactError("hints: a frame in too many packages")
    companions: dict[int, tuple[int, ...]] = {}
    frame = -1
    for _ in range(reader.next(frames)):
        before, frame = frame, max(frame, 0) + reader.next()
        if frame <= before:
            raise ArtifactError("hints: companions are not sorted")
        others = [reader.frame(frame, frames) + _unzigzag(reader.next()) for _ in range(reader.next(MAX_COMPANIONS))]
        companions[frame] = tuple(reader.frame(other, frames) for other in others)
    return _hints(groups, packages, companions)


def _decode_groups(reader: _Numbers, frames: int) -> list[tuple[int, int]]:
    groups: list[tuple[int, int]] = []
    first, left = 0, _OVERLAP * frames
    for _ in range(reader.next(left)):
        first += reader.next()
        count = reader.next(left)
        left -= count
        reader.frame(first + count - 1, frames)
        groups.append((first, count))
    if any(before >= after for before, after in pairwise(groups)) or any(count < 2 for _, count in groups):
        raise ArtifactError("hints: groups are not sorted, or one is of one frame")
    return groups


def _ascending(reader: _Numbers, count: int, frames: int) -> tuple[int, ...]:
    found: list[int] = []
    for _ in range(count):
        found.append(reader.frame((found[-1] if found else 0) + reader.next(), frames))
    if any(before >= after for before, after in pairwise(found)):
        raise ArtifactError("hints: frames of a package are not sorted")
    return tuple(found)


def _flat(groups: list[tuple[int, int]]) -> Iterable[int]:
    for step, (_, count) in zip(_steps([first for first, _ in groups]), groups, strict=True):
        yield step
        yield count


def _steps(frames: Sequence[int]) -> list[int]:
    return [frame - before for frame, before in zip(frames, (0, *frames), strict=False)]


def _zigzag(number: int) -> int:
    return 2 * number if number >= 0 else -2 * number - 1


def _unzigzag(number: int) -> int:
    return number >> 1 if not number & 1 else -(number >> 1) - 1


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Numbers:
    """What is left of a list of numbers."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def next(self, most: int = (1 << 32) - 1) -> int:
        """The next number; ArtifactError if there is none, or if it is larger."""
        number = shift = 0
        while True:
            if self._at >= len(self._data) or shift > 28:
                raise ArtifactError("hints: cut off, or a number of more than 32 bits")
            byte = self._data[self._at]
            self._at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if number > most:
            raise ArtifactError(f"hints: {number} where {most} are possible")
        return number

    @staticmethod
    def frame(number: int, frames: int) -> int:
        """A frame's number, checked."""
        if not 0 <= number < frames:
            raise ArtifactError(f"hints: frame {number} of {frames}")
        return number

    def end(self) -> None:
        if self._at != len(self._data):
            raise ArtifactError("hints: bytes behind the last one")
