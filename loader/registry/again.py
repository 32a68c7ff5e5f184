"""Another range of a blob, asked for in the words that have just got one: same server, path and login.

What finds them (mirrors, redirects, tokens, schemes) takes longer than a near registry's answer. So it is done anew
only every few seconds, and when anything at all is not as it was the last time.
"""

from __future__ import annotations

import mmap
import re
import socket
import threading
import time
from typing import Any

from erofs_builder.frames import BLOCK, MAX_ENCODED_BLOCKS, Frame
from loader.registry.ranges import RangeResponse

try:
    from loader._take import ffi, lib
except ImportError:  # a checkout that is not built yet
    lib = None  # type: ignore[assignment]

KEPT = 10.0  # seconds for which the words are used: as long as a mirror that is well again may wait for its turn
_local = threading.local()
_SPAN = re.compile(rb"\r\nRange: bytes=[0-9]+-[0-9]+\r\n")


class Taken:
    """What came of a frame that was received, checked and perhaps decoded and written without the interpreter."""

    __slots__ = ("began", "came", "data", "right", "written")

    def __init__(self, data: memoryview, right: bool, written: bool, began: float, came: float) -> None:
        """`data`: the frame, in the form that was asked for if it is `right`, until this thread's next `take`. `began`,
        `came`: when the head of the answer had come, and when the frame had, time.monotonic()."""
        self.data, self.right, self.written, self.began, self.came = data, right, written, began, came


class Again:
    """Asks one server for ranges of one blob. Thread-safe."""

    def __init__(self, response: RangeResponse, shown: str, place: int | None) -> None:
        """From an answer; ValueError if it was none to a range. `place`: of the endpoint that gave it."""
        match = _SPAN.search(response.request)
        if match is None:
            raise ValueError("no request for a range")
        self.place = place
        self.pool, self.shown = response.pool, shown
        self._before, self._behind = response.request[: match.start()], response.request[match.end() :]
        self._until = time.monotonic() + KEPT
        timeout = self.pool.timeout
        self.patience = min(int((timeout if timeout is not None else 3600.0) * 250), 1 << 31)  # ms, of four slices one
        self.by_hand = lib is None or not self.pool.plain

    @property
    def fresh(self) -> bool:
        return time.monotonic() < self._until

    def ask(self, offset: int, length: int) -> Asked | None:
        """Send a request; None if it could not be sent at once."""
        request = b"%b\r\nRange: bytes=%d-%d\r\n%b" % (self._before, offset, offset + length - 1, self._behind)
        sock = self.pool.ask(request)
        return None if sock is None else Asked(self, sock, request, offset, length)


class Asked:
    """A request for adjacent frames that is on its way. `take` them one after another, or else `resume` the answer;
    then `close`. A thread has one of these at a time."""

    def __init__(self, again: Again, sock: socket.socket, request: bytes, offset: int, length: int) -> None:
        self._again, self._request = again, request
        self._sock: socket.socket | None = sock  # until its answer was read to the end
        self._offset, self._length = offset, length
        self._left = length
        self._come = b""  # of it, when it is not for C to go on
        self.began: float | None = None  # when its head had come, if that is known then: time.monotonic()
        self._room: _Room | None = None

    def take(self, frame: Frame, decode: bool = False, file: int = -1) -> Taken | None:
        """Receive the next frame, compare its sha256, decode it if that is wanted, and if all is right write it into a
        descriptor, where it belongs.

        None: something is odd, or slow: go on with `resume`.
        """
        room = self._room or self._begin()
        if room is None:
            return None
        size = frame.decoded_size if decode else 0
        if size:
            room.have_plain(size)
        answer = room.answer
        place = frame.decoded_offset if decode else frame.encoded_offset
        result = lib.eod_take(answer, frame.encoded_size, frame.digest, size, file, place)
        if result == lib.EOD_ODD:
            self._come = bytes(room.buffer[: answer.have])
            self.began = answer.began / 1e9 or None
            return None
        self._left -= frame.encoded_size
        if not self._left:
            self._give_back()
        data = room.plain[:size] if size and result != lib.EOD_WHOLE else room.encoded(frame.encoded_size)
        written = result == lib.EOD_WRITTEN
        return Taken(data, result != lib.EOD_WHOLE, written, answer.began / 1e9, answer.came / 1e9)

    def _begin(self) -> _Room | None:
        """Have the answer come into this thread's memory; None if that is not for C to do."""
        again, sock = self._again, self._sock
        if again.by_hand or sock is None:
            return None
        room: _Room | None = getattr(_local, "room", None)
        if room is None:
            room = _local.room = _Room()
        room.have_buffer(self._length)
        lib.eod_begin(room.answer, sock.fileno(), self._offset, self._offset + self._length - 1, again.patience)
        self._room = room
        return room

    def _give_back(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self._again.pool.give_back(sock)

    def resume(self) -> RangeResponse | None:
        """The answer, behind the frames that were taken. None if it is not just the range: ask in the ordinary way."""
        sock, self._sock = self._sock, None
        if sock is None:
            return None
        passed = self._length - self._left
        response = self._again.pool.resume(sock, self._come, self._again.shown, self._request, passed)
        if response is None:
            return None
        span = f"bytes {self._offset}-{self._offset + self._length - 1}/"
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(span):
            return response
        response.close()
        return None

    def close(self) -> None:
        """End the connection, unless it was given back or is the answer's that goes on."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()


class _Room:
    """What a thread receives into and decodes into, kept between its answers."""

    def __init__(self) -> None:
        self.answer = ffi.new("struct eod_answer *")
        self.buffer = self.plain = memoryview(b"")
        self._for_c: list[Any] = [None, None, None]  # what `answer` points to

    def have_buffer(self, length: int) -> None:
        """Room for the head and each of the frames in a range of `length` bytes. What was there is lost."""
        size = lib.EOD_LONGEST_HEAD + min(length, MAX_ENCODED_BLOCKS * BLOCK)
        if len(self.buffer) < size:
            self.buffer = _memory(size)
            self._for_c[0] = self.answer.buffer = ffi.from_buffer("uint8_t[]", self.buffer)
            self.answer.room = size

    def have_plain(self, size: int) -> None:
        """Room for a decoded frame. What was there is lost."""
        if self._for_c[2] is None:
            self._for_c[2] = self.answer.decoder = ffi.gc(lib.ZSTD_createDCtx(), lib.ZSTD_freeDCtx)
        if len(self.plain) < size:
            self.plain = _memory(size)
            self._for_c[1] = self.answer.plain = ffi.from_buffer("uint8_t[]", self.plain)
            self.answer.plain_room = size

    def encoded(self, size: int) -> memoryview:
        """The frame that has come last, of this size."""
        body = self.answer.body
        return self.buffer[body : body + size]


def _memory(size: int) -> memoryview:
    """Of which nobody clears what is not used."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
