"""A server that sends a byte now and then, each well within the timeout, does not hold a reader."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loader.errors import TransientRegistryError
from loader.registry import patience
from loader.registry.client import Registry
from loader.registry.config import HostConfig, RegistryConfig
from loader.registry.pace import SLOWEST, Pace
from loader.registry.transport import HttpRequest, PooledTransport
from tests.support.registry import self_signed

TIMEOUT = 0.3
TRICKLES = {
    "head": b"HTTP/1.1 2",
    "fields": b"HTTP/1.1 200 OK\r\nX-Filler: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n",
    "body without a length": b"HTTP/1.1 200 OK\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2000\r\n",
    "length of a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@contextmanager
def trickling(start: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server (host:port) that answers with `start` at once, then with a zero ten times in a timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with suppress(OSError), connection, tls.wrap_socket(connection, True) if tls else connection as stream:
                stream.recv(65536)
                stream.sendall(start)
                while True:
                    stream.sendall(b"0")
                    time.sleep(TIMEOUT / 10)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def transport() -> Iterator[PooledTransport]:
    made = PooledTransport(RegistryConfig(timeout=TIMEOUT))
    yield made
    made.close()


def _read(transport: PooledTransport, url: str, ranges: bool) -> None:
    answer = transport.send(HttpRequest("GET", url, {"Range": "bytes=0-8999"} if ranges else {}))
    try:
        answer.read(9000)
    finally:
        answer.close()


@pytest.mark.parametrize("ranges", [False, True], ids=["document", "range"])
@pytest.mark.parametrize("start", list(TRICKLES.values()), ids=list(TRICKLES))
def test_what_trickles_times_out(transport: PooledTransport, start: bytes, ranges: bool) -> None:
    with trickling(start) as address, pytest.raises(TransientRegistryError, match="timed out"):
        _read(transport, f"http://{address}/", ranges)


@pytest.mark.parametrize("ranges", [False, True], ids=["document", "range"])
def test_what_trickles_through_tls_times_out(tmp_path: Path, ranges: bool) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*(files := self_signed(tmp_path)))
    with trickling(TRICKLES["body"], tls) as address:
        config = RegistryConfig(timeout=TIMEOUT, hosts={address: HostConfig(ca_file=str(files[0]))})
        transport = PooledTransport(config)
        with pytest.raises(TransientRegistryError, match="timed out"):
            _read(transport, f"https://{address}/", ranges)
        transport.close()


def test_a_reader_in_small_pieces_is_not_held_either(transport: PooledTransport) -> None:
    with trickling(TRICKLES["body"]) as address:
        answer = transport.send(HttpRequest("GET", f"http://{address}/", {"Range": "bytes=0-8999"}))
        with pytest.raises(TransientRegistryError, match="timed out"):
            for _ in range(9000):
                answer.read(1)
        answer.close()


def test_a_manifest_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    with trickling(TRICKLES["body"]) as address:
        registry = Registry(address, "r", RegistryConfig(timeout=TIMEOUT))
        with pytest.raises(TransientRegistryError, match="timed out"):
            registry.resolve("tag")
        registry.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("loader.registry.pace.time.monotonic", lambda: now[0])
    return now


def _feed(pace: Pace, clock: list[float], *pieces: tuple[float, int]) -> None:
    """Pieces that each come after so many seconds of waiting."""
    for seconds, count in pieces:
        pace.start()
        clock[0] += seconds
        pace.came(count)


def test_waits_add_up_and_the_time_between_them_does_not(clock: list[float]) -> None:
    pace = Pace(30)
    _feed(pace, clock, (29, 1), (10, 1), (10, 1))
    clock[0] += 1000  # the reader's own
    _feed(pace, clock, (9, 1))
    with pytest.raises(TimeoutError):
        _feed(pace, clock, (2, 1))


def test_a_slow_line_is_no_trickle(clock: list[float]) -> None:
    _feed(Pace(30), clock, *[(10, 10 * SLOWEST)] * 100)
    _feed(Pace(None), clock, *[(100, 1)] * 100)


def test_the_last_piece_may_be_late(clock: list[float]) -> None:
    pace = Pace(30)
    _feed(pace, clock, (1, 1), (20, 1))
    clock[0] += 20
    pace.came(1, more=False)


def test_a_stall_is_a_timeout_since_the_last_bytes(clock: list[float]) -> None:
    pace = Pace(4)
    _feed(pace, clock, (3, 1), (1, 10 * SLOWEST))
    for _ in range(3):
        pace.start()
        clock[0] += 1
        pace.nothing()
    clock[0] += 1
    with pytest.raises(TimeoutError):
        pace.nothing()
