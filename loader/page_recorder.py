"""Record which pages a command touches of the mounts of an image (mounts/tracefs.py), by path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from erofs_builder.page_trace import PageRun, gathered
from loader.errors import KernelSupportError, LoaderError
from mounts.tracefs import page_events


def record_pages(targets: Sequence[Path], action: Callable[[], None]) -> list[PageRun]:
    """Every page that is used while `action` runs, in order. The mounts must be of the decoded form.

    Their page cache is emptied first: what another process has mapped stays there, and is not seen.
    """
    paths: dict[tuple[int, int], bytes] = {}
    for target in targets:
        for path, device, inode in _uncached_files(os.fsencode(target)):
            paths.setdefault((device, inode), path)
    devices = {target.stat().st_dev for target in targets}
    try:
        with page_events(devices) as seen:
            action()
    except OSError as error:
        raise KernelSupportError(
            f"cannot record what is touched: {error}", hint="this needs root and the filemap trace events of Linux 6.12"
        ) from None
    if seen.lost:
        raise LoaderError(f"the kernel's trace buffer was full: {seen.lost} events are missing")
    touched = (
        PageRun(paths[event.device, event.inode], event.first, event.last)
        for event in seen.events
        if (event.device, event.inode) in paths
    )
    return gathered(touched)


def _uncached_files(root: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each regular file below `root` (path from there, st_dev, st_ino), out of the page cache if nobody maps it."""
    stack = [b""]
    while stack:
        directory = stack.pop()
        with os.scandir(os.path.join(root, directory)) as entries:  # noqa: PTH118 - bytes
            for entry in sorted(entries, key=lambda each: each.name):
                path = directory + b"/" + entry.name if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
                elif entry.is_file(follow_symlinks=False):
                    fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                        status = os.fstat(fd)
                        yield path, status.st_dev, status.st_ino
                    finally:
                        os.close(fd)
