"""urllib3's connections, with a pace for whatever comes over them: heads, lengths of chunks and bodies alike."""

from __future__ import annotations

import io
import socket
from http.client import HTTPResponse
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from loader.registry.pace import Pace


class _PacedStream(io.RawIOBase):
    """A socket's stream that TimeoutError ends when it comes too slowly; each wait ends by the socket's own timeout."""

    def __init__(self, raw: io.RawIOBase, timeout: float | None) -> None:
        self._raw = raw
        self._pace = Pace(timeout)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._pace.start()
        count: int | None = self._raw.readinto(buffer)
        self._pace.came(count or 0, more=bool(count))
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _PacedResponse(HTTPResponse):
    """The standard library's, reading through such a stream."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp = io.BufferedReader(_PacedStream(self.fp.detach(), sock.gettimeout()))


class _PacedConnection(HTTPConnection):
    response_class = _PacedResponse


class _PacedTlsConnection(HTTPSConnection):
    response_class = _PacedResponse


class _PacedPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PacedConnection


class _PacedTlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _PacedTlsConnection


def paced(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """The same pools, with connections that keep the pace. Before the first request."""
    manager.pool_classes_by_scheme = {"http": _PacedPool, "https": _PacedTlsPool}
    return manager
