"""The benches' slow link carries every byte and counts it. How fast it is, the benches show."""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.link import Link

BODY = random.Random(1).randbytes(3_000_000)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{http_server.server_address[1]}"
        http_server.shutdown()
        thread.join()


def _get(address: str, times: int) -> list[str]:
    connection = http.client.HTTPConnection(address, timeout=60)
    digests = []
    for _ in range(times):
        connection.request("GET", "/")
        digests.append(hashlib.sha256(connection.getresponse().read()).hexdigest())
    connection.close()
    return digests


def test_every_byte_arrives_and_is_counted(server: str) -> None:
    expected = hashlib.sha256(BODY).hexdigest()
    with Link(server, rate=100e6, rtt=0.002) as link:
        assert _get(link.address, 2) == [expected] * 2
        counters = link.reset()
        assert counters.connections == 1
        assert 2 * len(BODY) < counters.down < 2 * len(BODY) + 1000
        assert 0 < counters.up < 1000
        assert link.counters() == (0, 0, 0)


def test_connections_share_one_rate(server: str) -> None:
    with Link(server, rate=100e6, rtt=0) as link:
        threads = [threading.Thread(target=_get, args=(link.address, 1)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert link.counters().connections == 4
        assert link.counters().down > 4 * len(BODY)


def test_refused_target_closes_the_connection() -> None:
    with Link("127.0.0.1:1", rate=1e6, rtt=0) as link, pytest.raises((http.client.HTTPException, OSError)):
        _get(link.address, 1)


def test_a_link_can_become_fast(server: str) -> None:
    with Link(server, rate=20e3, rtt=0) as link:
        reader = threading.Thread(target=_get, args=(link.address, 1))
        reader.start()
        link.set_rate(100e6)
        reader.join()
        assert link.counters().down > len(BODY)
