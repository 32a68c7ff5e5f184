"""What is read once a frame was: places in an image's files, kept small, for a node may have many of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from erofs_builder.frame_list import Place
from loader.cache.files import CacheFile


class Follows:
    """`others` are read next, unless one of `unless` was read before; both without what the files do not have."""

    __slots__ = ("_files", "_others", "_unless")

    def __init__(self, files: tuple[CacheFile | None, ...], others: Iterable[Place], unless: Iterable[Place]) -> None:
        self._files = files
        self._others, self._unless = _runs(others), _runs(unless)

    @property
    def others(self) -> Iterator[tuple[CacheFile, int]]:
        return self._keys(self._others)

    @property
    def unless(self) -> Iterator[tuple[CacheFile, int]]:
        return self._keys(self._unless)

    def _keys(self, runs: array[int]) -> Iterator[tuple[CacheFile, int]]:
        for number, first, stop in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
            if number < len(self._files) and (file := self._files[number]) is not None:
                for frame in range(first, min(stop, len(file.table))):
                    yield file, frame


def _runs(places: Iterable[Place]) -> array[int]:
    """File by number, first frame and end of one run after another."""
    runs = array("I")
    for number, frame in places:
        if runs and runs[-3] == number and runs[-1] == frame:
            runs[-1] += 1
        else:
            runs.extend((number, frame, frame + 1))
    return runs
