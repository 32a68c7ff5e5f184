"""Both ends of a connection to a server of ranges."""

from __future__ import annotations

import socket
import threading
from typing import Self

from loader.registry.again import Again, Asked
from loader.registry.ranges import Origin, RangePool


def plain_head(offset: int, length: int) -> bytes:
    """The head of an answer with just these bytes."""
    fields = f"Content-Length: {length}\r\nContent-Range: bytes {offset}-{offset + length - 1}/99999999"
    return f"HTTP/1.1 206 Partial Content\r\n{fields}\r\n\r\n".encode()


class Conversation:
    """A server's end of a connection, which one request has used before, and how to ask for more."""

    def __init__(self, timeout: float = 8.0) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.pool = RangePool(Origin("127.0.0.1", self._listener.getsockname()[1], None, 5.0, timeout))
        server = threading.Thread(target=self._begin)
        server.start()
        response = self.pool.send("/blob?x=1", {"Range": "bytes=0-1", "Authorization": "Bearer t"}, "shown")
        server.join()
        assert response is not None and response.read() == b"ab"
        response.close()
        self.again = Again(response, "shown", 3)

    def _begin(self) -> None:
        self.server, _ = self._listener.accept()
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.recv(65536)
        self.server.sendall(b"HTTP/1.1 206 x\r\nContent-Length: 2\r\nContent-Range: bytes 0-1/9\r\n\r\nab")

    def ask(self, offset: int, length: int, *answer: bytes) -> Asked:
        """Ask for a range; what is given of the answer is there at once."""
        asked = self.again.ask(offset, length)
        assert asked is not None
        request = self.server.recv(65536)
        assert request.startswith(b"GET /blob?x=1 HTTP/1.1\r\n") and request.endswith(b"\r\n\r\n")
        assert f"\r\nRange: bytes={offset}-{offset + length - 1}\r\n".encode() in request
        assert b"\r\nAuthorization: Bearer t\r\n" in request
        for part in answer:
            self.server.sendall(part)
        return asked

    def close(self) -> None:
        self.pool.close()
        self.server.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
