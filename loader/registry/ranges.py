"""GET over kept sockets: a reader, or a mount, waits for each, so this is HTTP/1.1 with as little around it as can be.

`RangePool.send` returns None for whatever is out of the ordinary (an odd URL or header, an answer of unknown length or
one that cannot be parsed): the caller asks the general client again, and its word counts.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from loader.errors import TransientRegistryError, UnreachableError
from loader.registry.pace import SLICES, Pace

_HEAD_LIMIT = 65536
_FIRST = 16384  # bytes asked for with the head: the body of a short answer comes along
_SHORT = 16384  # bytes of a body that are rather read than its connection closed
_KEPT = 64  # idle connections: as many as readers may wait at once
_FRESH = 0.5  # seconds for which a connection is not suspected; if it was closed all the same, we ask once more
_MOST_INTERIM = 8
_TARGET = re.compile(r"/[!-~]*\Z")
_FIELD = re.compile(r"[!-~][ -~]*\Z")
_STATUS = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: |\Z)")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")


class Origin(NamedTuple):
    """A server. `context` is there for HTTPS; the times are seconds: for a connection, and for each wait on it."""

    host: str
    port: int
    context: ssl.SSLContext | None
    connect_timeout: float | None
    timeout: float | None


class StaleConnectionError(TransientRegistryError):
    """The connection broke before an answer came."""


class _Headers(Mapping[str, str]):
    """The fields of an answer by name, whatever its case."""

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        return self._fields.get(name.lower(), default)


class _Head(NamedTuple):
    status: int
    fields: dict[str, str]
    length: int
    keep: bool


class RangeResponse:
    """One answer; see `transport.HttpResponse`."""

    def __init__(
        self, pool: RangePool, sock: socket.socket, head: _Head, begun: bytes, shown: str, pace: Pace, request: bytes
    ) -> None:
        self.status = head.status
        self.pool, self.request = pool, request  # what asked, for `Again`
        self.headers: Mapping[str, str] = _Headers(head.fields)
        self._pool, self._shown, self._keep, self._pace = pool, shown, head.keep, pace
        self._socket: socket.socket | None = sock
        self._begun = begun
        self._left = head.length

    def read(self, amount: int | None = None, /) -> bytes:
        """All of the next `amount` bytes, fewer only at the end."""
        wanted = self._left if amount is None else min(amount, self._left)
        begun, self._begun = self._begun[:wanted], self._begun[wanted:]
        data = begun if len(begun) == wanted else self._receive(begun, wanted)
        self._left -= len(data)
        return data

    def _receive(self, begun: bytes, wanted: int) -> bytes:
        sock = self._socket
        if sock is None:
            raise TransientRegistryError(f"{self._shown}: the connection broke (closed)")
        try:
            if (
                not begun and self._pool.plain
            ):  # mostly: all of it comes at once, into memory that nobody cleared before
                begun = _receive_whole(sock, wanted, self._pace)
                self._came(len(begun), 0, wanted)
                if len(begun) == wanted:
                    return begun
            data = bytearray(wanted)
            data[: len(begun)] = begun
            view, position = memoryview(data), len(begun)
            while position < wanted:
                count = self._pool.receive_into(sock, view[position:], self._pace)
                self._came(count, position, wanted)
                position += count
        except TimeoutError:
            self._drop()
            raise TransientRegistryError(f"{self._shown}: timed out") from None
        except OSError as error:
            self._drop()
            raise TransientRegistryError(f"{self._shown}: the connection broke ({_reason(error)})") from None
        except TransientRegistryError:
            self._drop()
            raise
        return data  # type: ignore[return-value]  # nobody changes it

    def _came(self, count: int, position: int, wanted: int) -> None:
        """Behind the first `position` of the bytes that are wanted, so many came; 0: nothing will any more."""
        if not count:
            raise TransientRegistryError(f"{self._shown}: the connection broke ({wanted - position} bytes are missing)")
        self._pace.came(count, position + count < self._left)

    def close(self) -> None:
        """Keep the connection if its answer was read, or little of it is left."""
        if self._socket is not None and 0 < self._left <= _SHORT and self._keep:
            try:
                self.read()
            except TransientRegistryError:
                return
        sock, self._socket = self._socket, None
        if sock is not None:
            if self._keep and not self._left:
                self._pool.give_back(sock)
            else:
                sock.close()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class RangePool:
    """Kept connections to one server. Thread-safe."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._idle: list[tuple[socket.socket, float]] = []  # with the moment when each was used last
        self._lock = threading.Lock()
        self._closed = False
        self.receive_into: Callable[[socket.socket, memoryview, Pace], int] = (
            _receive_some if origin.context else _receive_all
        )
        default = 443 if origin.context else 80
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        self._host = host if origin.port == default else f"{host}:{origin.port}"

    def send(self, target: str, headers: Mapping[str, str], shown: str) -> RangeResponse | None:
        """GET a path with its query. None: ask otherwise. StaleConnectionError: a kept connection was dead.

        `shown` is the URL as a message may show it. UnreachableError, ssl.SSLError: no connection could be made.
        """
        request = _encode(target, self._host, headers)
        if request is None:
            return None
        sock = self._take()
        kept = sock is not None
        if sock is None:
            sock = self._connect(shown)
        pace = Pace(self._origin.timeout)
        try:
            sock.sendall(request)
            head, rest = _receive_head(sock, pace)
        except (BlockingIOError, TimeoutError):
            sock.close()
            raise TransientRegistryError(f"{shown}: timed out") from None
        except (EOFError, OSError) as error:
            sock.close()
            if kept:
                self.clear()  # the server has closed what it kept: all of that
            raise StaleConnectionError(f"{shown}: the connection broke ({_reason(error)})") from None
        except ValueError:
            sock.close()
            return None
        return self._answer(sock, head, rest, shown, pace, request)

    def _answer(
        self, sock: socket.socket, head: _Head, rest: bytes, shown: str, pace: Pace, request: bytes
    ) -> RangeResponse:
        if len(rest) > head.length:  # bytes that nobody asked for: not to be taken for the next answer
            head = head._replace(keep=False)
        return RangeResponse(self, sock, head, rest[: head.length], shown, pace, request)

    @property
    def timeout(self) -> float | None:
        """Seconds for which a server may be silent."""
        return self._origin.timeout

    @property
    def plain(self) -> bool:
        """Whether what comes from its sockets is the answer itself, and not TLS."""
        return self._origin.context is None

    def ask(self, request: bytes) -> socket.socket | None:
        """Send a request that went well before. None: no connection that is open and idle has taken it."""
        sock = self._take()
        try:
            if sock is not None:
                sock.sendall(request)
        except OSError:
            if sock is not None:
                sock.close()
            return None
        return sock

    def resume(self, sock: socket.socket, data: bytes, shown: str, request: bytes, passed: int) -> RangeResponse | None:
        """The answer to what was asked by `ask`; None if it is odd in any way.

        `data` has come of it: its head, and what lies behind the first `passed` bytes of its body, which were used.
        """
        pace = Pace(self._origin.timeout)
        try:
            head, rest = _receive_head(sock, pace, data)
        except (EOFError, OSError, ValueError):
            sock.close()
            return None
        return self._answer(sock, head._replace(length=max(0, head.length - passed)), rest, shown, pace, request)

    def give_back(self, sock: socket.socket) -> None:
        """Keep a connection whose answer was read to the end."""
        with self._lock:
            if not self._closed and len(self._idle) < _KEPT:
                self._idle.append((sock, time.monotonic()))
                return
        sock.close()

    def clear(self) -> None:
        """Close the connections that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for sock, _ in idle:
            sock.close()

    def close(self) -> None:
        self._closed = True
        self.clear()

    def _take(self) -> socket.socket | None:
        """The idle connection that was used last, if the server has not closed it."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                sock, used = self._idle.pop()
            if time.monotonic() - used < _FRESH or _is_silent(sock):
                return sock
            sock.close()

    def _connect(self, shown: str) -> socket.socket:
        origin = self._origin
        try:
            sock = socket.create_connection((origin.host, origin.port), origin.connect_timeout)
        except TimeoutError:
            raise UnreachableError(f"{shown}: timed out") from None
        except (OSError, UnicodeError) as error:
            raise UnreachableError(f"{shown}: cannot connect ({_reason(error)})") from None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.context is not None:
                sock = origin.context.wrap_socket(sock, server_hostname=origin.host)
                sock.settimeout(origin.timeout)
            else:
                _set_timeout(sock, origin.timeout)
        except TimeoutError:
            sock.close()
            raise UnreachableError(f"{shown}: timed out") from None
        except ssl.SSLError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise UnreachableError(f"{shown}: cannot connect ({_reason(error)})") from None
        return sock


def _encode(target: str, host: str, headers: Mapping[str, str]) -> bytes | None:
    if not _TARGET.match(target):
        return None
    lines = [f"GET {target} HTTP/1.1\r\nHost: {host}"]
    for name, value in headers.items():
        if not _NAME.match(name) or not _FIELD.match(value):
            return None
        lines.append(f"{name}: {value}")
    lines.append("\r\n")
    return "\r\n".join(lines).encode("ascii")


def _receive_head(sock: socket.socket, pace: Pace, data: bytes = b"") -> tuple[_Head, bytes]:
    """The head of the answer that counts, and what came behind it. EOFError: nothing came; ValueError: malformed."""
    for _ in range(_MOST_INTERIM):
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _HEAD_LIMIT:
                raise ValueError("a head without an end")
            more = _receive(sock, pace)
            if not more:
                raise EOFError("the server closed it")
            data += more
            pace.came(len(more))
        head = parse_head(data[:end])
        data = data[end + 4 :]
        if head.status >= 200:
            return head, data
    raise ValueError("too many interim answers")


def parse_head(data: bytes) -> _Head:
    """The status line and fields of an answer, without the empty line; ValueError for what is not plain."""
    first, *lines = data.decode("latin-1").split("\r\n")
    match = _STATUS.match(first)
    if match is None:
        raise ValueError(f"status line {first[:80]!r}")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.match(name) or "\n" in value or "\r" in value or "\0" in value:
            raise ValueError(f"field {line[:80]!r}")
        name = name.lower()
        if name in fields and name in ("content-length", "content-range", "transfer-encoding"):
            raise ValueError(f"{name} twice")
        fields[name] = value.strip(" \t")
    status = int(match[2])
    length = fields.get("content-length", "0" if status < 200 or status in (204, 304) else "")
    if "transfer-encoding" in fields or not (length.isascii() and length.isdecimal()) or len(length) > 18:
        raise ValueError("an answer of unknown length")
    keep = match[1] == "1" and fields.get("connection", "keep-alive").lower() == "keep-alive"
    return _Head(status, fields, 0 if status in (204, 304) else int(length), keep)


def _receive(sock: socket.socket, pace: Pace) -> bytes:
    """What comes next, at most `_FIRST` bytes."""
    while True:
        pace.start()
        try:
            return sock.recv(_FIRST)
        except BlockingIOError:
            pace.nothing()


def _receive_all(sock: socket.socket, view: memoryview, pace: Pace) -> int:
    """As much as there is room for, or as comes in a slice of the timeout: one system call, mostly."""
    while True:
        pace.start()
        try:
            return sock.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            pace.nothing()


def _receive_whole(sock: socket.socket, amount: int, pace: Pace) -> bytes:
    """The same, as bytes of their own."""
    while True:
        pace.start()
        try:
            return sock.recv(amount, socket.MSG_WAITALL)
        except BlockingIOError:
            pace.nothing()


def _receive_some(sock: socket.socket, view: memoryview, pace: Pace) -> int:
    pace.start()
    return sock.recv_into(view)


def _set_timeout(sock: socket.socket, seconds: float | None) -> None:
    """Have the kernel keep the time: then a read is one system call.

    A receive that waits for all of its bytes does not say when the last one came, only that its time is over: so it
    waits for a slice of the timeout, and the pace adds up.
    """
    sock.settimeout(None)
    if seconds is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds / SLICES))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6) or int(seconds < 1))


def _is_silent(sock: socket.socket) -> bool:
    """Whether an idle connection is open and nothing came that nobody asked for."""
    try:
        if isinstance(sock, ssl.SSLSocket):
            return _is_silent_beneath(sock)
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_silent_beneath(sock: ssl.SSLSocket) -> bool:
    """The same for TLS, whose socket refuses flags: looked at through a copy of its descriptor."""
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as raw:
        raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)[:120] or type(error).__name__
