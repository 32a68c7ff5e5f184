"""Fetch an image, or some of its paths, before anybody reads them; demand goes first all the same."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.erofs.reader import Reader
from erofs_builder.model import Node
from erofs_builder.payload import Form
from loader.cache.claims import FlightTable, Priority, Waiter
from loader.cache.files import CacheFile
from loader.cache.state import ImageRecord
from loader.errors import LoaderError, NotFoundError
from loader.worker.images import Images
from loader.worker.mounting import Mounting

INTERVAL = 0.5  # seconds between two reports


@dataclass(slots=True)
class _Part:
    """The wanted frames of one cache file. `done` is set when they landed, `error` is the errno if they did not."""

    file: CacheFile
    frames: list[int]
    done: threading.Event
    error: int = 0

    def finish(self, error: int) -> None:
        self.error = error
        self.done.set()

    @property
    def missing(self) -> int:
        """Encoded bytes that are not there yet."""
        ready, table = self.file.ready, self.file.table
        return sum(table[frame].encoded_size for frame in self.frames if not ready[frame])


def prefetch(
    image: ImageRecord, paths: list[str], form: Form, images: Images, mounting: Mounting, flights: FlightTable
) -> Iterator[dict[str, Any]]:
    """Fetch what is missing; yields progress in encoded bytes, at last `finished`. LoaderError if it cannot be had."""
    with mounting.opened(image, form) as files:
        wanted = _frames_of_paths(images, image, form, paths) if paths else None
        parts = [
            _Part(
                file,
                sorted(wanted.get(file.blob, ())) if wanted is not None else list(range(len(file.table))),
                threading.Event(),
            )
            for file in files
        ]
        total = sum(part.missing for part in parts)
        for part in parts:
            flights.want(part.file, part.frames, Priority.BACKGROUND, Waiter(part.finish, time.monotonic() + 86400))
        while unfinished := [part for part in parts if not part.done.is_set()]:
            yield {"total": total, "fetched": total - sum(part.missing for part in parts), "finished": False}
            unfinished[0].done.wait(INTERVAL)
        if failed := [str(part.file) for part in parts if part.error]:
            raise LoaderError(
                f"could not fetch all of {', '.join(failed)}", hint="`erofs-loader status` has the last errors"
            )
        yield {"total": total, "fetched": total, "finished": True}


def _frames_of_paths(images: Images, image: ImageRecord, form: Form, paths: Iterable[str]) -> dict[Digest, set[int]]:
    """Frames of every regular file at or below the paths."""
    payload = images.payloads.sound(image.digest, form)
    root = Reader(payload.erofs, payload.tables, form).read_tree()
    frames: dict[Digest, set[int]] = {}
    for text in paths:
        stack = [_lookup(root, text)]
        while stack:
            node = stack.pop()
            stack.extend((node.children or {}).values())
            for extent in node.extents if stat.S_ISREG(node.mode) else ():
                if extent.blob is not None:
                    frames.setdefault(extent.blob.digest, set()).add(extent.frame)
    return frames


def _lookup(root: Node, text: str) -> Node:
    """The node at a path; symbolic links are followed as inside of the image."""
    pending = [name for name in text.encode(errors="surrogateescape").split(b"/") if name not in (b"", b".")][::-1]
    walked, links = [root], 0
    while pending:
        name = pending.pop()
        if name == b"..":
            walked = walked[:-1] or [root]
            continue
        node = (walked[-1].children or {}).get(name)
        if node is None:
            raise NotFoundError(f"{text}: no such file in the image")
        if stat.S_ISLNK(node.mode):
            links += 1
            if links > 40:
                raise NotFoundError(f"{text}: too many symbolic links")
            pending.extend([part for part in node.target.split(b"/") if part not in (b"", b".")][::-1])
            walked = [root] if node.target.startswith(b"/") else walked
        else:
            walked.append(node)
    return walked[-1]
