"""Whether a blob is read as a whole: by tar, by a search, by whatever goes through all of a tree.

Files lie in a blob in about the order of their paths, but small ones of a kind share frames and so lie somewhat apart.
Such a walk comes forward on the whole, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Container

from erofs_builder.frames import FrameTable

NEIGHBOURS = 32  # frames before one that tell
LEAST = 4  # of these were read, and at least half of all
FIRST_WINDOW = 64 << 10  # bytes that may be expected while little has come true


class Scan:
    """What is expected of one blob. Not thread-safe."""

    def __init__(self, table: FrameTable) -> None:
        self._table = table
        self._expected = set[int]()
        self._open = 0  # encoded bytes of these
        self._came = 0  # of those that were expected, and read

    def after(self, frames: range, following: int, read: Container[int], most: int) -> list[int]:
        """`frames` are read, as those in `read` were: which will be, from `following` on.

        As far ahead as `most` bytes and half of what came true; in all of the blob no more than what came true, so
        that walks that end cost no more than they have saved.
        """
        for frame in self._expected.intersection(frames):
            self._expected.discard(frame)
            self._open -= self._table.frame_encoded_size(frame)
            self._came += self._table.frame_encoded_size(frame)
        before = range(max(0, frames.start - NEIGHBOURS), frames.start)
        if sum(map(read.__contains__, before)) < max(LEAST, len(before) / 2):
            return []
        return self._fill(frames.stop, following, read, min(most, max(self._came // 2, FIRST_WINDOW)))

    def _fill(self, stop: int, frame: int, read: Container[int], window: int) -> list[int]:
        """What is missing for a window of so many bytes, once half of it is."""
        table, ahead = self._table, self._table.encoded_size_of(range(stop, frame))
        while frame < len(table) and ahead < window and (frame in self._expected or frame in read):
            ahead += table.frame_encoded_size(frame) if frame in self._expected else 0
            frame += 1
        if 2 * ahead > window:
            return []
        guessed: list[int] = []
        allowed = max(self._came, FIRST_WINDOW)
        while frame < len(table) and ahead < window and self._open < allowed:
            if frame not in read and frame not in self._expected:
                ahead += table.frame_encoded_size(frame)
                self._open += table.frame_encoded_size(frame)
                guessed.append(frame)
            frame += 1
        self._expected.update(guessed)
        return guessed
