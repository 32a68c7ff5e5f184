"""The kernel's own word that cached bytes are bad: it checks each encoded frame and logs which inode it could not read.

    erofs (device erofs): read error -117 @ 3 of nid 753

The device's name does not tell the image, so the inode's frames are checked for every image that is mounted. They are
few. The log is opened before the worker is confined; where that is not allowed, only `scrub` finds bit rot.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable

from erofs_builder.digest import Digest
from erofs_builder.erofs.reader import Reader
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.payload import Form
from loader.cache.files import CacheFile
from loader.cache.state import State
from loader.errors import LoaderError
from loader.keeper.readable import readable
from loader.worker.images import Images
from loader.worker.objects import Objects

log = logging.getLogger(__name__)

KERNEL_LOG = "/dev/kmsg"
GATHER = 0.3  # seconds in which lines are gathered: the kernel writes many about one frame
MOST_INODES = 256  # looked up at a time
_LINE = re.compile(rb"erofs.*read error -(?:117|74|5)\b.* of nid (\d{1,19})")


def open_kernel_log() -> int | None:
    """The kernel's log from now on; None if it may not be read."""
    try:
        fd = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        log.warning("%s: %s: bit rot in the cache is only found by `scrub`", KERNEL_LOG, error.strerror)
        return None
    return fd


def read_complaints(fd: int) -> set[int]:
    """The inodes that lines which are there now complain about."""
    found: set[int] = set()
    while True:
        try:
            line = os.read(fd, 8192)
        except BlockingIOError:
            return found
        except BrokenPipeError:  # lines were overwritten before they were read
            continue
        if match := _LINE.search(line):
            found.add(int(match[1]))


class Complaints:
    """Follows the log in a thread."""

    def __init__(
        self, fd: int, state: State, images: Images, objects: Objects, check: Callable[[CacheFile, Iterable[int]], int]
    ) -> None:
        self._fd, self._state, self._images, self._objects, self._check = fd, state, images, objects, check

    def start(self) -> None:
        threading.Thread(target=self._follow, name="complaints", daemon=True).start()

    def _follow(self) -> None:
        while True:
            readable([self._fd])
            time.sleep(GATHER)
            try:
                if inodes := read_complaints(self._fd):
                    self.heed(set(sorted(inodes)[:MOST_INODES]))
            except Exception:
                log.exception("the kernel's complaints could not be looked into")

    def heed(self, inodes: set[int]) -> int:
        """Check these inodes' frames in every image that is mounted in the encoded form; how many were damaged."""
        mounted = {mount.image for mount in self._state.mounts() if mount.form is Form.ENCODED}
        damaged = 0
        for image in mounted:
            try:
                payload = self._images.payloads.sound(image, Form.ENCODED)
                reader = Reader(payload.erofs, payload.tables, Form.ENCODED)
            except (LoaderError, FormatError, IntegrityError, OSError) as error:
                log.warning("%s: %s", image, error)
                continue
            frames = {place for nid in inodes for place in _frames(reader, nid)}
            for blob in {blob for blob, _ in frames}:
                wanted = sorted(frame for owner, frame in frames if owner == blob)
                for file in self._objects.files_of(Form.ENCODED, blob):
                    damaged += self._check(file, wanted)
        return damaged


def _frames(reader: Reader, nid: int) -> list[tuple[Digest, int]]:
    try:
        return [(extent.blob.digest, extent.frame) for extent in reader.extents_at(nid) if extent.blob is not None]
    except FormatError:
        return []  # another image's inode
