"""What the cache holds, in bytes on disk, and what can go: evicted whole blobs, least recently used first."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.layout import Layout
from loader.cache.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlobUsage:
    """A blob in the cache; `allocated` bytes are on disk. `referenced`: some image uses it, `pinned`: and is pinned."""

    blob: Digest
    form: Form
    allocated: int
    used: float
    referenced: bool
    pinned: bool


def measure(layout: Layout, state: State) -> list[BlobUsage]:
    """Every blob in our own cache files, least recently used first."""
    used = state.last_used()
    images = state.images()
    referenced = {blob for image in images for blob, _ in image.blobs}
    pinned = {blob for image in images if image.pinned for blob, _ in image.blobs}
    found = [
        BlobUsage(blob, form, _allocated(path), used.get((blob, form), 0.0), blob in referenced, blob in pinned)
        for form, blob, path in _blobs(layout)
    ]
    return sorted(found, key=lambda usage: (usage.used, usage.blob.raw))


def _blobs(layout: Layout) -> Iterator[tuple[Form, Digest, Path]]:
    for form in Form:
        directory = layout.root / "blobs" / form.value
        for path in directory.iterdir() if directory.is_dir() else ():
            if len(path.name) == 64 and not set(path.name) - set("0123456789abcdef"):
                yield form, Digest(bytes.fromhex(path.name)), path


def _allocated(directory: Path) -> int:
    """Bytes on the disk, of what is not replaced or evicted in this very moment."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def evict(layout: Layout, state: State, usage: BlobUsage) -> int:
    """Remove a blob's files. The caller has made sure that no object is open on them. Bytes that were freed."""
    path = layout.blob(usage.blob, usage.form)
    gone = layout.tmp / f"evicted-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        path.rename(gone)  # at once: a killed process leaves all of it, or a leftover that the next start removes
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for name in ("synced", "ready"):  # no room for another name: then what says that something is there goes first
            (path / name).unlink(missing_ok=True)
        gone = path
    shutil.rmtree(gone)
    try:
        state.forget_blob(usage.blob, usage.form)
    except sqlite3.OperationalError as error:  # no room yet; it is a row that nobody asks for
        log.warning("%s stays in the database: %s", usage.blob, error)
    return usage.allocated


def choose_victims(
    usages: list[BlobUsage], busy: Callable[[BlobUsage], bool], *, needed: int | None, unreferenced_only: bool
) -> list[BlobUsage]:
    """Which blobs go, in order, to free `needed` bytes (None: all that can): unreferenced ones, then the others."""
    chosen: list[BlobUsage] = []
    freed = 0
    for wanted in (False,) if unreferenced_only else (False, True):
        for usage in usages:
            if needed is not None and freed >= needed:
                return chosen
            if usage.referenced is wanted and not usage.pinned and not busy(usage):
                chosen.append(usage)
                freed += usage.allocated
    return chosen
