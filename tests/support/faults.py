"""Faults that a proxy in front of a real registry answers ranges or documents with. None is simulated.

A fault takes the answer over: it gets the handler of the proxy, which holds the reader's request, and the registry's
own answer to it.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler


@dataclass(frozen=True, slots=True)
class Answer:
    """What the registry answered to the request of `handler`."""

    handler: BaseHTTPRequestHandler
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte that were asked for."""
        first, _, last = self.handler.headers["Range"].removeprefix("bytes=").partition("-")
        return int(first), int(last)

    def send(self, status: int | None = None, data: bytes | None = None, **headers: str) -> None:
        """Answer; `data` may be shorter than a Content-Length that is given. Headers as CamelCase_With_Underscores."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        body = self.data if data is None else data
        kept = {} if status else {name: value for name, value in self.headers.items() if name.startswith("Content-")}
        self.handler.send_response(status or self.status)
        for name, value in ({"Content-Length": str(len(body))} | kept | sent).items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(body)

    def hang_up(self) -> None:
        """End the connection without a word more."""
        self.handler.close_connection = True

    def reset(self) -> None:
        """End the connection with a reset."""
        self.handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.close_connection = True


Fault = Callable[[Answer], None]


def hang_up(answer: Answer) -> None:
    answer.hang_up()


def reset_mid_body(answer: Answer) -> None:
    answer.send(data=answer.data[: len(answer.data) // 2])
    answer.reset()


def truncated_body(answer: Answer) -> None:
    answer.send(data=answer.data[: len(answer.data) // 2])
    answer.hang_up()


def stall_mid_body(answer: Answer) -> None:
    answer.send(data=answer.data[: len(answer.data) // 2])
    answer.handler.wfile.flush()
    time.sleep(10)  # longer than twice the time of a wait
    answer.hang_up()


def trickle(answer: Answer) -> None:
    """A byte now and then, for as long as somebody listens: no single wait is ever long."""
    answer.send(data=answer.data[:100])
    try:
        for byte in answer.data[100:]:
            answer.handler.wfile.write(bytes((byte,)))
            answer.handler.wfile.flush()
            time.sleep(0.2)
    except OSError:
        answer.hang_up()


def trickled_head(answer: Answer) -> None:
    """The same before the body has begun."""
    try:
        for number in range(600):
            answer.handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Filler: "[number : number + 1] or b"x")
            answer.handler.wfile.flush()
            time.sleep(0.2)
    except OSError:
        answer.hang_up()


def wrong_range(answer: Answer) -> None:
    first, last = answer.span
    answer.send(206, answer.data, Content_Range=f"bytes {first + 4096}-{last + 4096}/*")


def short_range(answer: Answer) -> None:
    first, _ = answer.span
    half = answer.data[: len(answer.data) // 2]
    answer.send(206, half, Content_Range=f"bytes {first}-{first + len(half) - 1}/*")


def bit_flip(answer: Answer) -> None:
    middle = len(answer.data) // 2
    answer.send(data=answer.data[:middle] + bytes((answer.data[middle] ^ 1,)) + answer.data[middle + 1 :])


def swapped_range(answer: Answer) -> None:
    """The right length and header, the blocks of it in another order."""
    answer.send(data=answer.data[4096:] + answer.data[:4096] if len(answer.data) > 4096 else answer.data[::-1])


def zeros(answer: Answer) -> None:
    answer.send(data=bytes(len(answer.data)))


def not_gzip(answer: Answer) -> None:
    """A proxy's error page with the status and length of success."""
    answer.send(data=(b"<html>busy</html>" * (len(answer.data) // 17 + 1))[: len(answer.data)])


def status(code: int, **headers: str) -> Fault:
    """Answer with this status."""

    def fault(answer: Answer) -> None:
        answer.send(code, b'{"errors": [{"code": "FAULT", "message": "told to"}]}', **headers)

    return fault


def redirect_to_itself(answer: Answer) -> None:
    answer.send(307, b"", Location=answer.handler.path)


def redirect_to(url: str) -> Fault:
    """Send the reader elsewhere."""
    return status(307, Location=url)


def closed_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Plan:
    """A fault for the next `times` answers (None: for all until it is lifted) to what has `where` in its path.

    It counts how many it met.
    """

    def __init__(self, fault: Fault, times: int | None = None, where: str = "") -> None:
        self._fault = fault
        self._left = times
        self._where = where
        self._lock = threading.Lock()
        self.met = 0

    def take(self, path: str) -> Fault | None:
        if self._where not in path:
            return None
        with self._lock:
            if self._left is not None and self._left <= 0:
                return None
            if self._left is not None:
                self._left -= 1
            self.met += 1
            return self._fault
