"""What an image's start reads: lists of frames that are fetched when it is mounted, before anybody asks for them.

Two lists may be there: the builder's, from the image's command and what that needs, and a trace, from a start that was
watched (traces.py). A trace knows better, so with one the builder's list is not used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from itertools import groupby

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.frame_list import Place, decode_frames
from loader.cache.claims import FlightTable, Priority
from loader.cache.files import CacheFile
from loader.cache.layout import Layout, replace_file

log = logging.getLogger(__name__)
START, TRACE = "start", "trace"


class Starts:
    """The lists of all images on this node."""

    def __init__(self, layout: Layout, flights: FlightTable) -> None:
        self._layout = layout
        self._flights = flights

    def remember(self, image: Digest, name: str, text: str) -> None:
        """Keep a list with an image's metadata; an empty one is forgotten."""
        path = self._layout.start_list(image, name)
        if text:
            replace_file(path, text.encode(), self._layout.tmp, durable=False)
        else:
            path.unlink(missing_ok=True)

    def places(self, image: Digest) -> list[Place]:
        """The best list of an image, empty without one."""
        for name in (TRACE, START):
            with contextlib.suppress(OSError):
                text = self._layout.start_list(image, name).read_text()
                try:
                    return decode_frames(text)
                except ArtifactError as error:
                    log.warning("%s: %s", image, error)
        return []

    def fetch(self, image: Digest, files: Sequence[CacheFile | None]) -> None:
        """Have an image's start fetched; `files` are those of its blobs, in order."""
        for blob, run in groupby(self.places(image), lambda place: place[0]):
            file = files[blob] if blob < len(files) else None
            if file is not None:
                frames = [frame for _, frame in run if frame < len(file.table)]
                self._flights.want(file, frames, Priority.AHEAD)
