"""A proxy in front of a registry that counts ranges, and breaks what it is told to break."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from tests.support.faults import Answer, Plan


class FaultyRegistry:
    """Forwards to `target` (host:port). Attributes may be changed while it runs.

    corrupt: flip one bit in the middle of every range · refuse: answer ranges with this HTTP status · off: hang up on
    everything · cut: send only the first half of every range · plan: a fault of faults.py for some or all ranges ·
    documents: the same for what is read whole · whole: ignore ranges and answer 200 with everything ·
    revoked: logins that count as expired.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.corrupt = False
        self.cut = False
        self.off = False
        self.refuse: int | None = None
        self.plan: Plan | None = None
        self.documents: list[Plan] = []
        self.whole = False
        self.spoil_blobs = False
        self.most_at_once = 0
        self.connections = 0
        self.delay = 0.0  # seconds before each range
        self.ranges: list[tuple[str, int, int]] = []  # blob path, first and last byte of each range that was served
        self.seen: Counter[str] = Counter()
        self._logins: set[str] = set()
        self._revoked: set[str] = set()
        self._at_once = 0
        self._lock = threading.Lock()
        self._start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def overlaps(self) -> list[tuple[str, int]]:
        """Blob path and offset of every byte range that was served more than once, merged."""
        found = []
        for blob in {blob for blob, _, _ in self.ranges}:
            end = -1
            for first, last in sorted((first, last) for name, first, last in self.ranges if name == blob):
                if first <= end:
                    found.append((blob, first))
                end = max(end, last)
        return found

    def revoke_logins(self) -> None:
        self._revoked = set(self._logins)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Meanwhile nothing listens there: connections are refused, the open ones end."""
        address = self._server.server_address
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.off = True
        try:
            yield
        finally:
            self.off = False
            self._start(int(address[1]))
            self._thread.start()

    def _start(self, port: int = 0) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def _forward(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length) if length else None
        connection = http.client.HTTPConnection(self.target)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        if self.whole:
            headers.pop("Range", None)
        login = headers.get("Authorization")
        if login:
            self._logins.add(login)
            headers["Authorization"] = login + "x" if login in self._revoked else login
        connection.request(request.command, request.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), data

    def _range(self, path: str, header: str, data: bytes) -> bytes:
        first, _, last = header.removeprefix("bytes=").partition("-")
        with self._lock:
            self.ranges.append((path, int(first), int(last or int(first) + len(data) - 1)))
        if self.corrupt and data:
            middle = len(data) // 2
            return data[:middle] + bytes((data[middle] ^ 1,)) + data[middle + 1 :]
        return data

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                registry.seen[self.command] += 1
                wanted = self.headers.get("Range")
                if registry.off:
                    self.close_connection = True
                    return
                if wanted and registry.refuse:
                    self._answer(registry.refuse, {}, b"")
                    return
                with registry._counted():
                    status, headers, data = registry._forward(self)
                    plans = registry.documents if not wanted else [registry.plan] if registry.plan else []
                    if self.command == "GET" and (
                        fault := next(filter(None, (p.take(self.path) for p in plans)), None)
                    ):
                        fault(Answer(self, status, headers, data))
                        return
                    if registry.spoil_blobs and len(data) > 100_000:
                        data = data[:5000] + bytes((data[5000] ^ 1,)) + data[5001:]
                    if wanted:
                        time.sleep(registry.delay)
                    if wanted and status in (200, 206):
                        data = registry._range(self.path, wanted, data)
                    self._answer(status, headers, data)

            def setup(self) -> None:
                registry.connections += 1
                super().setup()

            def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                        self.send_header(name, value)
                head = self.command == "HEAD"
                self.send_header("Content-Length", headers.get("Content-Length", "0") if head else str(len(data)))
                self.end_headers()
                if not head:
                    cut = registry.cut and self.headers.get("Range") is not None
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                    self.close_connection = self.close_connection or cut

            def log_message(self, format: str, *args: Any) -> None:
                pass

        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            setattr(Handler, f"do_{method}", Handler._serve)
        return Handler
