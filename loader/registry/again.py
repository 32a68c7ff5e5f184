"""Another range of a blob, asked for in the words that have just got one: same server, path and login.

What finds them (mirrors, redirects, tokens, schemes) takes longer than a near registry's answer. So it is done anew
only every few seconds, and when anything at all is not as it was the last time.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from array import array
from typing import Any

from loader.registry.ranges import RangeResponse

try:
    from loader._take import ffi, lib
except ImportError:  # a checkout that is not built yet
    lib = None  # type: ignore[assignment]

KEPT = 10.0  # seconds for which the words are used: as long as a mirror that is well again may wait for its turn
HEAD_ROOM = 20480
_local = threading.local()
_SPAN = re.compile(rb"\r\nRange: bytes=[0-9]+-[0-9]+\r\n")


class Taken:
    """What came of a range that was received, checked and perhaps written without the interpreter."""

    __slots__ = ("at", "data", "right", "written")

    def __init__(self, data: memoryview, right: bool, written: bool, at: float) -> None:
        """`data`: all of the range, until this thread's next `take`; `at`: when its head came, time.monotonic()."""
        self.data, self.right, self.written, self.at = data, right, written, at


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
    """A request that is on its way. `take` its answer, or else `resume` it."""

    def __init__(self, again: Again, sock: socket.socket, request: bytes, offset: int, length: int) -> None:
        self._again, self._sock, self._request = again, sock, request
        self._offset, self._length = offset, length
        self._begun = b""

    def take(self, digest: bytes, file: int = -1, place: int = 0) -> Taken | None:
        """Receive the range, compare its sha256, and if it is right write it into a descriptor at `place`.

        None: something is odd, or slow: go on with `resume`.
        """
        again = self._again
        if again.by_hand:
            return None
        buffer, pointer, out, numbers = _buffers(HEAD_ROOM + self._length)
        last = self._offset + self._length - 1
        result = lib.eod_take(
            self._sock.fileno(), pointer, len(buffer), self._offset, last, again.patience, digest, file, place, out
        )
        have, body, at = numbers
        if result == lib.EOD_ODD:
            self._begun = bytes(buffer[:have])
            return None
        again.pool.give_back(self._sock)
        data = buffer[body : body + self._length]
        return Taken(data, result != lib.EOD_WHOLE, result == lib.EOD_WRITTEN, at / 1e9)

    def resume(self) -> RangeResponse | None:
        """The answer, from what has come of it on. None if it is not just the range: ask in the ordinary way."""
        response = self._again.pool.resume(self._sock, self._begun, self._again.shown, self._request)
        if response is None:
            return None
        span = f"bytes {self._offset}-{self._offset + self._length - 1}/"
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(span):
            return response
        response.close()
        return None


def _buffers(size: int) -> tuple[memoryview, Any, Any, array[int]]:
    """This thread's, of this size or more: bytes, the same for C, three numbers for C, the same."""
    known: tuple[memoryview, Any, Any, array[int]] | None = getattr(_local, "buffers", None)
    if known is None or len(known[0]) < size:
        room, numbers = bytearray(size), array("Q", bytes(24))
        known = memoryview(room), ffi.from_buffer(room), ffi.from_buffer("uint64_t[]", numbers), numbers
        _local.buffers = known
    return known
