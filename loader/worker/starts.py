"""What an image's start reads: lists of frames that are fetched when it is mounted, before anybody asks for them.

Two lists may be there: the builder's, from the image's command and what that needs, and a trace, from a start that was
watched (traces.py). A trace knows better, so with one the builder's list is not used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.followers import decode_followers
from erofs_builder.frame_list import Place, decode_frames, encode_frames
from loader.cache.claims import FlightTable, Priority
from loader.cache.files import CacheFile
from loader.cache.layout import Layout, replace_file
from loader.errors import LoaderError
from loader.registry.base import ImageSource
from loader.trace import find_trace
from loader.worker.follows import Follows
from loader.worker.readahead import ReadAhead

log = logging.getLogger(__name__)
START, TRACE, FOLLOWERS = "start", "trace", "followers"
STRETCH = 2 << 20
SMALL = 4 << 20  # bytes of a blob
PAUSE = 30.0  # seconds without the kernel's readahead, where the list has all that a start reads


class Starts:
    """The lists of all images on this node."""

    def __init__(self, layout: Layout, flights: FlightTable, readahead: ReadAhead) -> None:
        self._layout = layout
        self._flights = flights
        self._readahead = readahead
        self._pool = ThreadPoolExecutor(2, "traces")

    def remember(self, image: Digest, name: str, text: str) -> None:
        """Keep a list with an image's metadata; an empty one is forgotten."""
        path = self._layout.start_list(image, name)
        if text:
            replace_file(path, text.encode(), self._layout.tmp, durable=False)
        else:
            path.unlink(missing_ok=True)

    def look_for_trace(self, source: ImageSource, image: Digest) -> Future[None]:
        """Ask the source for a trace of an image and keep it; done when that is known, whatever came of it."""
        return self._pool.submit(self._look_for_trace, source, image)

    def _look_for_trace(self, source: ImageSource, image: Digest) -> None:
        try:
            if trace := find_trace(source, image):
                self.remember(image, TRACE, trace)
        except (LoaderError, FormatError, IntegrityError, OSError) as error:
            log.info("%s: no trace: %s", image, error)

    def forget(self, file: CacheFile) -> None:
        """The file was closed: what was read of it belongs to no start any more."""
        self._readahead.forget(file)

    def trace(self, files: Sequence[Iterable[CacheFile]]) -> str:
        """What was read of an image's blobs (`files`: the open cache files of each) since they were opened.

        Of a file that has lost its mark nobody knows what else was read: if it is small, all of it is, at last.
        """
        reads = {
            (number, frame): moment
            for number, opened in enumerate(files)
            for file in opened
            for frame, moment in self._readahead.reads(file).items()
        }
        unknown = {
            (number, frame)
            for number, opened in enumerate(files)
            for file in opened
            if file.completed and file.table.blob_size <= SMALL
            for frame in range(len(file.table))
        }
        ordered = sorted(reads, key=lambda place: (reads[place], place))
        return encode_frames(ordered + sorted(unknown - reads.keys()))

    def places(self, image: Digest) -> list[Place]:
        """The best list of an image, empty without one."""
        for name in (TRACE, START):
            with contextlib.suppress(OSError):
                text = self._layout.start_list(image, name).read_text()
                try:
                    return decode_frames(text)
                except FormatError as error:
                    log.warning("%s: %s", image, error)
        return []

    def complete(self, image: Digest) -> bool:
        """Whether a list was watched, and has all that a start reads: a trace, or the one range of a rebuilt layout."""
        if self._layout.start_list(image, TRACE).exists():
            return bool(self.places(image))
        places = self.places(image)
        return bool(places) and places == [(places[0][0], frame) for frame in range(len(places))]

    def pause(self, image: Digest, files: Sequence[CacheFile] = ()) -> float:
        """Seconds without the kernel's readahead: where the list is complete and not all of it is in `files` yet."""
        if not self.complete(image):
            return 0.0
        here = all(
            number < len(files) and frame < len(files[number].table) and files[number].ready[frame]
            for number, frame in self.places(image)
        )
        return 0.0 if here else PAUSE

    def fetch(self, image: Digest, files: Sequence[CacheFile | None]) -> None:
        """Have an image's start fetched; `files` are those of its blobs, in order."""
        places = self.places(image)
        for blob, file in enumerate(files):
            if file is not None and places:
                self._readahead.expect(file.blob.raw, (frame for number, frame in places if number == blob))
        self._expect_followers(image, files)
        known = [
            (number, frame)
            for number, frame in places
            if number < len(files) and (file := files[number]) is not None and frame < len(file.table)
        ]
        for number, run in groupby(_gathered(known, files), lambda place: place[0]):
            if (file := files[number]) is not None:
                self._flights.want(file, [frame for _, frame in run], Priority.AHEAD)

    def _expect_followers(self, image: Digest, files: Sequence[CacheFile | None]) -> None:
        """Tell what plug-ins and packages need, unless a start was watched: its list has what of that was needed."""
        if self.complete(image):
            return
        shared, by_head = tuple(files), dict[Place, list[Follows]]()
        with contextlib.suppress(OSError, FormatError):
            for head, unless, places in decode_followers(self._layout.start_list(image, FOLLOWERS).read_text()):
                by_head.setdefault(head, []).append(Follows(shared, places, unless))
        for (number, frame), follows in by_head.items():
            if number < len(files) and (file := files[number]) is not None:
                self._readahead.follow(file, frame, follows)


def _gathered(places: Sequence[Place], files: Sequence[CacheFile | None]) -> Iterator[Place]:
    """The places in their order, but sorted within stretches of STRETCH bytes: neighbours then make one range."""
    stretch: list[Place] = []
    size = 0
    for number, frame in places:
        stretch.append((number, frame))
        file = files[number]
        size += file.table[frame].encoded_size if file is not None else 0
        if size >= STRETCH:
            yield from sorted(stretch)
            stretch, size = [], 0
    yield from sorted(stretch)
