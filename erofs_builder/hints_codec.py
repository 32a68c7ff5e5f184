"""The bytes of hints (hints.py) in a metadata payload; docs/format.md, section 3.1.

A byte of version, 1, and for each blob, in the order of the device slots, three lists, each with its length before it.
All numbers are LEB128 of at most 32 bits. What is sorted ascends: nothing is there twice.

    groups       first frame less the one before, frames; sorted
    packages     number of frames, then each less the one before; sorted
    companions   frame less the one before, number of companions, each less its frame as a zigzag number; sorted
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

from erofs_builder.errors import ArtifactError
from erofs_builder.frames import FrameTable
from erofs_builder.hints import MAX_COMPANIONS, MAX_PACKAGE, MOST_PACKAGES, OVERLAP, Hints, make_hints

_VERSION = 1
_MOST_BYTES = 16  # for each frame of all blobs


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
    return make_hints(groups, packages, companions)


def _decode_groups(reader: _Numbers, frames: int) -> list[tuple[int, int]]:
    groups: list[tuple[int, int]] = []
    first, left = 0, OVERLAP * frames
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
