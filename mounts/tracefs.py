"""Which pages of a file system are used, as the kernel's trace events say: no policy, and nothing that stays behind.

The events are filemap:mm_filemap_fault (a page that a mapping touches) and filemap:mm_filemap_get_pages (pages that a
read(2) takes); 6.12 and later have them. Tracefs is mounted without a place in the tree, and the events go to a buffer
of their own.

A fault maps the pages around its own along with it, if they are in memory: what then touches those is not seen. So
nothing may be in memory but what was used: meanwhile there is no readahead, and the files must not be cached before.
Compressed files do not do: a frame is decoded whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mounts.readahead import backing_devices, restore_readahead, set_readahead
from mounts.syscalls import fsopen

PAGE = 4096
BUFFER_KIB = 8192  # for each CPU
_PAUSE = 0.05  # seconds between looks into the buffer
_FAULT, _READ = "mm_filemap_fault", "mm_filemap_get_pages"
# The end of a read is printed a page too far: the event carries the page behind the last one.
_LINE = re.compile(rb"(mm_filemap_(?:fault|get_pages)): dev=(\d+):(\d+) ino=([0-9a-f]+) ofs=(\d+)(?:-(\d+))?")
_LOST = re.compile(rb"LOST (\d+) EVENTS")


class Touched(NamedTuple):
    """Pages of an inode that were used, `last` included."""

    device: int  # st_dev
    inode: int
    first: int
    last: int


class PageEvents:
    """What was seen: `events` in the order of time, `lost` how many the buffer had no room for."""

    def __init__(self) -> None:
        self.events: list[Touched] = []
        self.lost = 0

    def feed(self, text: bytes) -> None:
        """Take in whole lines of trace_pipe."""
        for line in text.splitlines():
            if match := _LINE.search(line):
                first, end = int(match[5]) // PAGE, int(match[6] or 0) // PAGE
                last = max(first, end - 1) if match[1] == _READ.encode() else first
                self.events.append(Touched(os.makedev(int(match[2]), int(match[3])), int(match[4], 16), first, last))
            elif match := _LOST.search(line):
                self.lost += int(match[1])


@contextlib.contextmanager
def page_events(devices: Iterable[int]) -> Iterator[PageEvents]:
    """Note what is used of the file systems with these st_dev while the context is open; complete once it is left.

    OSError: the kernel has no tracefs (ENODEV), not these events (ENOENT), or does not let us (EPERM).
    """
    seen = PageEvents()
    with _mounted("tracefs") as tracefs, _instance(tracefs) as instance:
        (instance / "buffer_size_kb").write_text(str(BUFFER_KIB))
        wanted = " || ".join(f"s_dev == {os.major(each) << 20 | os.minor(each)}" for each in devices)
        for name in (_FAULT, _READ):
            (instance / "events/filemap" / name / "filter").write_text(wanted)
        with _no_readahead(), _reader(instance / "trace_pipe", seen):
            for name in (_FAULT, _READ):
                (instance / "events/filemap" / name / "enable").write_text("1")
            yield seen


@contextlib.contextmanager
def _mounted(fstype: str) -> Iterator[Path]:
    """A mount that is nowhere attached, and gone when its descriptor closes."""
    with fsopen(fstype) as context:
        context.create()
        fd = context.mount(0)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def _instance(tracefs: Path) -> Iterator[Path]:
    directory = tracefs / "instances" / f"erofs-ondemand-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        for name in (_FAULT, _READ):
            with contextlib.suppress(OSError):
                (directory / "events/filemap" / name / "enable").write_text("0")
        directory.rmdir()


@contextlib.contextmanager
def _no_readahead() -> Iterator[None]:
    """Have every EROFS that is no block device read what is used and nothing else.

    Their backing devices do not say which mount they belong to, so it is all of them, for as long as this takes.
    """
    with contextlib.ExitStack() as stack:
        for device in backing_devices():
            try:
                stack.callback(restore_readahead, device, set_readahead(device, 0))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):  # unmounted just now
                    raise
        yield


@contextlib.contextmanager
def _reader(pipe: Path, seen: PageEvents) -> Iterator[None]:
    """Empty trace_pipe into `seen`, at last to its end."""
    fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    done = threading.Event()

    def read() -> None:
        rest = b""
        while True:
            last_look = done.is_set()
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    whole, newline, rest = (rest + data).rpartition(b"\n")
                    seen.feed(whole + newline)
            if last_look:
                return
            done.wait(_PAUSE)

    thread = threading.Thread(target=read, name="trace")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.close(fd)
