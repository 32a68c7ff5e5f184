"""GET over kept sockets, against servers that send what a table says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import TransientRegistryError, UnreachableError
from loader.registry.config import RegistryConfig
from loader.registry.ranges import Origin, RangePool, StaleConnectionError, parse_head
from loader.registry.transport import HttpRequest, PooledTransport
from tests.support.registry import free_port

SHOWN = "http://server/path"
OK = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nContent-Range: bytes 0-4/9\r\n\r\nhello"


class Server:
    """Sends one of `answers` for each request, whatever connection it comes by, then closes if it is told to."""

    def __init__(self, *answers: bytes, close: bool = False, pause: float = 0.0) -> None:
        self._answers, self._close, self._pause = list(answers), close, pause
        self.connections = 0
        self._pools: list[RangePool] = []
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:  # the client may go at any time
            while self._answers and (request := connection.recv(65536)):
                self.requests.append(request)
                answer = self._answers.pop(0)
                for start in range(0, len(answer), 1 + len(answer) // 3 if self._pause else len(answer)):
                    time.sleep(self._pause)
                    connection.sendall(answer[start:][: 1 + len(answer) // 3 if self._pause else len(answer)])
                if self._close:
                    return
            time.sleep(0.2 if not self._close else 0)

    def pool(self, timeout: float = 5.0) -> RangePool:
        self._pools.append(RangePool(Origin("127.0.0.1", self.port, None, 5.0, timeout)))
        return self._pools[-1]

    def close(self) -> None:
        self._listener.close()
        for pool in self._pools:
            pool.close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made: list[Server] = []
    yield made
    for server in made:
        server.close()


def _body(pool: RangePool, **headers: str) -> bytes | None:
    answer = pool.send("/path?query", {"Range": "bytes=0-4", **headers}, SHOWN)
    if answer is None:
        return None
    try:
        assert answer.headers["content-range"] == answer.headers.get("Content-Range")
        return bytes(answer.read())
    finally:
        answer.close()


def test_a_connection_is_kept(servers: list[Server]) -> None:
    servers.append(server := Server(OK, OK, OK))
    pool = server.pool()
    assert [_body(pool) for _ in range(3)] == [b"hello"] * 3
    assert server.connections == 1
    fields = f"Host: 127.0.0.1:{server.port}\r\nRange: bytes=0-4\r\n\r\n"
    assert server.requests[0] == b"GET /path?query HTTP/1.1\r\n" + fields.encode()


def test_an_answer_in_pieces(servers: list[Server]) -> None:
    servers.append(server := Server(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, pause=0.02))
    answer = server.pool().send("/", {}, SHOWN)
    assert answer is not None and answer.status == 206
    assert [bytes(answer.read(4)), bytes(answer.read(9)), answer.read(9)] == [b"hell", b"o", b""]
    answer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nno length",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        OK.replace(b": 5", b": five"),
        OK.replace(b": 5", b": -5"),
        OK.replace(b"Content-Range", b"Content-Length"),
        OK.replace(b"Content-Range:", b"Content Range:"),
        OK.replace(b"HTTP/1.1", b"HTTP/2"),
        OK.replace(b"206", b"20"),
        b"\x15\x03\x01\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
        b"HTTP/1.1 200 OK\r\n" + b"a" * 70000,
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_others(servers: list[Server], answer: bytes) -> None:
    servers.append(server := Server(answer, close=True))
    assert server.pool().send("/", {}, SHOWN) is None


@pytest.mark.parametrize("target", ["", "path", "/a b", "/a\r\nX: y", "/\x00", "/ü"])
def test_odd_paths_and_fields_are_not_sent(target: str) -> None:
    pool = RangePool(Origin("127.0.0.1", 1, None, 1.0, 1.0))
    assert pool.send(target, {}, SHOWN) is None
    assert pool.send("/", {"Authorization": f"Bearer {target or chr(10)}\r\n"}, SHOWN) is None


def test_a_body_that_breaks_off(servers: list[Server]) -> None:
    servers.append(server := Server(OK[:-2], close=True))
    answer = server.pool().send("/", {}, SHOWN)
    assert answer is not None
    with pytest.raises(TransientRegistryError, match="2 bytes are missing"):
        answer.read()
    answer.close()


def test_a_body_that_stalls(servers: list[Server]) -> None:
    servers.append(server := Server(OK[:-2]))
    answer = server.pool(0.1).send("/", {}, SHOWN)
    assert answer is not None
    with pytest.raises(TransientRegistryError):
        answer.read()
    answer.close()


def test_a_kept_connection_that_was_closed_is_replaced(servers: list[Server]) -> None:
    servers.append(server := Server(OK, OK, close=True))
    pool = server.pool()
    assert _body(pool) == b"hello"
    time.sleep(0.1)
    with pytest.raises(StaleConnectionError):
        _body(pool)
    assert _body(pool) == b"hello"
    servers.append(other := Server(OK, OK, close=True))
    transport = PooledTransport(RegistryConfig())
    for _ in range(2):
        request = HttpRequest("GET", f"http://127.0.0.1:{other.port}/path", {"Range": "bytes=0-4"})
        answer = transport.send(request)
        assert bytes(answer.read()) == b"hello"
        answer.close()
        time.sleep(0.1)
    transport.close()


def test_bytes_that_nobody_asked_for_are_no_answer(servers: list[Server]) -> None:
    servers.append(server := Server(OK + OK, OK.replace(b"hello", b"world")))
    pool = server.pool()
    assert [_body(pool), _body(pool)] == [b"hello", b"world"]
    assert server.connections == 2


def test_what_is_left_of_a_short_answer_is_read_and_of_a_long_one_not(servers: list[Server]) -> None:
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100000)
    servers.append(server := Server(OK, OK, long, OK))
    pool = server.pool()
    for connections in (1, 1, 1, 2):
        answer = pool.send("/", {}, SHOWN)
        assert answer is not None
        answer.close()
        assert server.connections == connections


def _document(transport: PooledTransport, server: Server) -> bytes:
    response = transport.send(HttpRequest("GET", f"http://127.0.0.1:{server.port}/v2/a/manifests/1", {"Accept": "x/y"}))
    try:
        return bytes(response.read())
    finally:
        response.close()


def test_documents_come_over_the_same_connections(servers: list[Server]) -> None:
    servers.append(server := Server(*[b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"] * 3))
    transport = PooledTransport(RegistryConfig(insecure=True))
    assert [_document(transport, server) for _ in range(3)] == [b"hello"] * 3
    assert server.connections == 1 and b"\r\nAccept: x/y\r\n" in server.requests[0]
    transport.close()


def test_a_server_that_answers_documents_oddly_is_asked_twice_but_once(servers: list[Server]) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    servers.append(server := Server(*[chunked] * 4))
    transport = PooledTransport(RegistryConfig(insecure=True))
    assert [_document(transport, server) for _ in range(3)] == [b"hello"] * 3
    assert len(server.requests) == 4
    transport.close()


def test_nobody_listens() -> None:
    with pytest.raises(UnreachableError, match="refused"):
        RangePool(Origin("127.0.0.1", free_port(), None, 1.0, 1.0)).send("/", {}, SHOWN)


@given(st.binary(max_size=200))
def test_any_head_is_parsed_or_refused(data: bytes) -> None:
    for head in (data, b"HTTP/1.1 206 OK\r\n" + data, OK[:-9] + data):
        try:
            parsed = parse_head(head)
        except ValueError:
            continue
        assert 100 <= parsed.status <= 999 and 0 <= parsed.length < 10**18
