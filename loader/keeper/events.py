"""The keeper's way of an event in C (csrc/events.c), as Python sees it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from fanotify.wire import Event, parse_events
from loader.keeper._events import ffi, lib
from loader.keeper.presence import Presence
from loader.keeper.requests import Repeats

Inode = tuple[int, int]  # device, number
_EVENT = 48  # bytes of one with its range
_MOST = 64
LONGEST = 0.25  # seconds without Python, which has a clock to watch


class Seen(NamedTuple):
    """An event that was seen to: answered (`present`), or journaled and perhaps sent to the worker.

    `failed` is the errno with which the kernel refused the answer, or 0. ENOENT: there was one before.
    """

    object: int
    offset: int
    length: int
    fd: int
    thread: int
    present: bool
    sent: bool
    failed: int


class Events:
    """Takes plain events, and answers those that need no worker. Not thread-safe."""

    def __init__(self, group: int, journal: mmap.mmap, readers: mmap.mmap) -> None:
        """`journal` and `readers` are the memory of these."""
        self._kept = ffi.from_buffer(journal), ffi.from_buffer(readers)
        plane = lib.eod_plane_new(group, *self._kept)
        if not plane:
            raise MemoryError
        self._plane = ffi.gc(plane, lib.eod_plane_free)
        self._buffer = bytearray(_EVENT * _MOST)
        self._room = ffi.from_buffer(self._buffer)
        self._events = ffi.new("struct eod_event[]", _MOST)
        self._rest = ffi.new("struct eod_rest *")
        self._bitmaps: dict[Inode, Any] = {}

    def put(self, inode: Inode, object_id: int, size: int, writer: int, presence: Presence | None) -> None:
        """Make an object known, or change what is."""
        bitmap = ffi.from_buffer(presence.memory) if presence is not None else None
        args = (bitmap, presence.half) if bitmap is not None and presence is not None else (ffi.NULL, 0)
        if lib.eod_plane_put(self._plane, *inode, object_id, size, writer, *args):
            raise MemoryError
        self._bitmaps[inode] = bitmap

    def drop(self, inode: Inode) -> None:
        """Leave the events of an object to Python."""
        lib.eod_plane_drop(self._plane, *inode)
        self._bitmaps.pop(inode, None)

    def know(self, thread: int, slot: int) -> None:
        """A thread's last read is in this slot of the readers' table."""
        if thread > 0:
            lib.eod_plane_reader(self._plane, thread, slot)

    def take(self, worker: int, first: int, epoll: int = -1) -> Iterator[Seen | Event]:
        """See to what waits: in the order of the events, those that were seen to, and those that were not. Answered
        READs of which there is nothing to be told any more are left out (`left_out`).

        Requests have the numbers from `first` on in this order; once journaled they are sent to `worker`, a socket,
        unless that is negative, or something comes before them that is not. While nothing comes but what is left out,
        and nothing else that `epoll` waits for, it waits for more. OSError as read(2) of the group;
        ValueError: malformed, of which nothing can be answered.
        """
        longest, room = int(LONGEST * 1000), len(self._buffer)
        count = lib.eod_plane_take(
            self._plane, worker, epoll, longest, first, self._room, room, self._events, self._rest
        )
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        for index in range(count):
            event = self._events[index]
            kind = event.kind
            if kind == lib.EOD_OTHER:
                yield Event(event.mask, event.fd, event.pid, event.offset, event.length)
            else:
                yield Seen(
                    event.object, event.offset, event.length, event.fd, event.pid,
                    kind == lib.EOD_PRESENT, kind == lib.EOD_SENT, event.failed,
                )  # fmt: skip
        begin, end = self._rest.begin, self._rest.end
        if begin < end:
            yield from parse_events(bytes(self._buffer[begin:end]))

    def left_out(self) -> tuple[int, Repeats]:
        """How many were since this was asked last: those that the worker was told of, and the others."""
        rest = self._rest
        found = rest.told, Repeats(rest.repeats, rest.repeated)
        rest.told = rest.repeats = rest.repeated = 0
        return found

    def allow(self, fd: int, writer: int, thread: int, object_id: int, offset: int, length: int) -> int | None:
        """Answer a journaled event with yes; the errno with which the kernel refused that, or 0.

        None: nothing was done. There is a hole, or something odd.
        """
        if not 0 < thread < 1 << 31:
            return None
        result: int = lib.eod_plane_allow(self._plane, fd, writer, thread, object_id, offset, length)
        return None if result > 0 else -result
