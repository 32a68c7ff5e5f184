"""A layout rebuilt from a trace: what a start touches lies in one blob, contiguous and in the order of its use.

The layers' blobs stay as they are, byte for byte, so that images go on sharing them. One more blob has, for each file
that the trace names,

    start   the touched pages, cut out at their boundaries: each run of a large file a frame, small files packed
    rest    what remains of the frames that were cut, behind all of the start

and the files' extents point there. The same blobs, trace and encoder give the same bytes.

A frame takes whole blocks, and compresses by itself: two runs are one frame, the gap between them in it, where that is
no larger than two frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from erofs_builder.blob import BlobWriter, Output, new_compressor, padding_for
from erofs_builder.frames import BLOCK
from erofs_builder.model import Blob, Extent, Node, replace_extents
from erofs_builder.page_trace import PageRun, traced_nodes

ReadFrame = Callable[[Blob, int], bytes]  # its content

LEVEL = 19  # zstd: this blob is small, and waited for
BIN = 512 << 10  # bytes of packed files in a frame
LONGEST_RUN = 64  # pages of one frame
SMALL_FILE = 12  # pages of a file that is taken whole, however few of them are touched
MOSTLY_TOUCHED = 128  # pages of a file that is taken whole if half of them are touched
REST = -1  # the order of what the start does not need
_REGION = 1024  # pages that are planned at a time
_CACHED = 32  # frames

Source = tuple[Blob, int, int, int]  # blob, frame, offset in it, length
Content = tuple[Extent, ...]


class Relaid(NamedTuple):
    """The new blob; its first `start_frames` frames are the start."""

    blob: Blob
    start_frames: int


@dataclass(slots=True)
class _Frame:
    """A frame to be written: what it is made of, each part at a multiple of 4 KiB; when the start needs it first."""

    order: int
    sources: list[list[Source]] = field(default_factory=list)
    size: int = 0
    number: int = -1

    def append(self, part: list[Source], length: int) -> int:
        offset = self.size
        self.sources.append(part)
        self.size += -(-length // BLOCK) * BLOCK
        return offset


class _Place(NamedTuple):
    """Where a part of a file will be."""

    frame: _Frame
    offset: int
    length: int


def rebuild(root: Node, runs: Sequence[PageRun], read_frame: ReadFrame, out: Output, threads: int = 2) -> Relaid | None:
    """Write the blob for a trace to `out` and point the tree's files at it; None if the trace names nothing in it.

    The directories below `root` are changed, files are replaced; hard links stay one node.
    """
    cache = _Frames(read_frame)
    plan = _Plan(cache)
    for content, pages in _touched(root, runs).items():
        plan.add(content, pages)
    start = sorted(plan.start, key=lambda frame: frame.order)
    if not start:
        return None
    with BlobWriter(out, level=LEVEL, threads=threads) as writer:
        for frame in (*start, *plan.rest):
            frame.number = writer.add(cache.assemble(frame))
        blob = Blob(writer.finish())
    moved = {content: tuple(_extents(places, blob)) for content, places in plan.files.items()}
    replace_extents(root, lambda node: moved.get(node.extents) or node.extents)
    return Relaid(blob, len(start))


def _touched(root: Node, runs: Iterable[PageRun]) -> dict[Content, dict[int, int]]:
    """Touched pages of each content (files of one content share it), in the order of use, and when each came first."""
    found: dict[Content, dict[int, int]] = {}
    order = 0
    for node, pages in traced_nodes(root, runs):
        known = found.setdefault(node.extents, {})
        for page in pages:
            known.setdefault(page, order)
            order += 1
    return found


def _extents(places: Iterable[Extent | _Place], blob: Blob) -> Iterator[Extent]:
    for place in places:
        yield place if isinstance(place, Extent) else Extent(blob, place.frame.number, place.offset, place.length)


class _Frames:
    """Reads frames of the layers' blobs; a few of them are kept."""

    def __init__(self, read_frame: ReadFrame) -> None:
        self._read = read_frame
        self._kept: dict[tuple[Blob, int], bytes] = {}

    def read(self, source: Source) -> bytes:
        blob, frame, offset, length = source
        data = self._kept.get((blob, frame))
        if data is None:
            data = self._kept[blob, frame] = self._read(blob, frame)
            while len(self._kept) > _CACHED:
                del self._kept[next(iter(self._kept))]
        return data[offset : offset + length]

    def join(self, sources: Iterable[Source]) -> bytes:
        return b"".join(map(self.read, sources))

    def assemble(self, frame: _Frame) -> bytes:
        """A frame's content."""
        content = bytearray()
        for part in frame.sources:
            content += self.join(part)
            content += bytes(-len(content) % BLOCK)
        if len(content) == BLOCK:
            content += bytes(BLOCK)  # see Packer: incompressible, it would take two blocks
        return bytes(content)


class _Plan:
    """Cuts files into frames. `files`: where the parts of each content will be, in order."""

    def __init__(self, frames: _Frames) -> None:
        self._frames = frames
        self._compressor = new_compressor()
        self._bin: _Frame | None = None
        self.start: list[_Frame] = []
        self.rest: list[_Frame] = []
        self.files: dict[Content, list[Extent | _Place]] = {}

    def add(self, content: Content, pages: dict[int, int]) -> None:
        """Take in a content with the order of use of its touched pages."""
        size = sum(extent.length for extent in content)
        count = -(-size // BLOCK)
        mostly = count <= SMALL_FILE or (2 * len(pages) >= count and count <= MOSTLY_TOUCHED)
        if len(content) > 1 or not mostly:
            self._cut(content, size, pages)
        elif content[0].blob is not None:
            self._pack(content, _sources(content, 0, size), size, min(pages.values()))

    def _pack(self, content: Content, source: list[Source], size: int, order: int) -> None:
        if self._bin is None or self._bin.size + size > BIN:
            self._bin = _Frame(order)
            self.start.append(self._bin)
        self.files[content] = [_Place(self._bin, self._bin.append(source, size), size)]

    def _cut(self, content: Content, size: int, pages: dict[int, int]) -> None:
        places: list[Extent | _Place] = []
        for first, end, kept in _regions(content, pages):
            if kept is not None:
                places.append(kept)
                continue
            for low, high, order in self._segments(content, size, first, end, pages):
                length = min(high * BLOCK, size) - low * BLOCK
                frame = _Frame(order)
                (self.rest if order == REST else self.start).append(frame)
                places.append(_Place(frame, frame.append(_sources(content, low * BLOCK, length), length), length))
        self.files[content] = places

    def _segments(
        self, content: Content, size: int, first: int, end: int, pages: dict[int, int]
    ) -> Iterator[tuple[int, int, int]]:
        """Cut the pages [first, end) of a file: (first page, end, order of use or REST)."""
        merged: list[tuple[int, int]] = []
        for low, high in _runs(first, end, pages):
            if merged and high - merged[-1][0] <= LONGEST_RUN and self._cheaper(content, size, merged[-1], (low, high)):
                low = merged.pop()[0]
            merged.append((low, high))
        at = first
        for low, high in merged:
            yield from ((*step, REST) for step in _steps(at, low))
            orders = {page: pages[page] for page in range(low, high) if page in pages}
            for step in _steps(low, high):
                yield (
                    *step,
                    min((orders[page] for page in range(*step) if page in orders), default=max(orders.values())),
                )
            at = high
        yield from ((*step, REST) for step in _steps(at, end))

    def _cheaper(self, content: Content, size: int, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether one frame of both runs takes no more blocks than two."""
        together, *apart = (self._blocks(content, size, *pages) for pages in ((one[0], other[1]), one, other))
        return together <= sum(apart)

    def _blocks(self, content: Content, size: int, first: int, end: int) -> int:
        source = _sources(content, first * BLOCK, min(end * BLOCK, size) - first * BLOCK)
        length = len(self._compressor.compress(self._frames.join(source)))
        return (length + len(padding_for(length))) // BLOCK


def _regions(content: Content, pages: dict[int, int]) -> Iterator[tuple[int, int, Extent | None]]:
    """The extents that stay, each alone; and the others, which are cut: (first page, end, None), neighbours as one."""
    at = 0
    first: int | None = None
    for extent in content:
        low, high = at // BLOCK, -(-(at + extent.length) // BLOCK)
        cut = extent.blob is not None and high - low > 1 and any(page in pages for page in range(low, high))
        if first is not None and (not cut or low - first >= _REGION):
            yield first, low, None
            first = None
        if cut:
            first = low if first is None else first
        else:
            yield low, high, extent
        at += extent.length
    if first is not None:
        yield first, -(-at // BLOCK), None


def _runs(first: int, end: int, pages: dict[int, int]) -> list[tuple[int, int]]:
    """Runs of touched pages in [first, end), grown so that neither they nor what is between them is a single page.

    The kernel's index cannot say that one block of a file lies in a frame of several.
    """
    runs: list[list[int]] = []
    for page in (page for page in range(first, end) if page in pages):
        if runs and runs[-1][1] == page:
            runs[-1][1] += 1
        else:
            runs.append([page, page + 1])
    grown: list[tuple[int, int]] = []
    for low, high in runs:
        if high - low == 1:
            low, high = (low, high + 1) if high < end else (low - 1, high)
        low = first if low == first + 1 else low
        high = end if high == end - 1 else high
        if grown and low - grown[-1][1] <= 1:
            before = grown.pop()
            low, high = before[0], max(before[1], high)
        grown.append((low, high))
    return grown


def _steps(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a range into equal frames of at most about LONGEST_RUN pages, none of a single page."""
    count = -(-(end - first) // LONGEST_RUN)
    for number in range(count):
        yield first + (end - first) * number // count, first + (end - first) * (number + 1) // count


def _sources(content: Content, offset: int, length: int) -> list[Source]:
    """The places in the blobs of a range of a file that has no hole there."""
    parts: list[Source] = []
    at = 0
    for extent in content:
        low, high = max(offset, at), min(offset + length, at + extent.length)
        if low < high:
            assert extent.blob is not None
            parts.append((extent.blob, extent.frame, extent.frame_offset + low - at, high - low))
        at += extent.length
    return parts
