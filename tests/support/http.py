"""The other end of the HTTP seam: answers from a function, requests on record."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping

from urllib3 import HTTPHeaderDict

from loader.errors import TransientRegistryError
from loader.registry.transport import HttpRequest


class FakeResponse:
    """An answer; `cut` makes its body break off there, as a lost connection does."""

    def __init__(
        self, status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.status = status
        self.headers = HTTPHeaderDict(headers or {})
        self._body = io.BytesIO(body if cut is None else body[:cut])
        self._cut = cut
        self.closed = False

    def read(self, amount: int | None = None, /) -> bytes:
        data = self._body.read(amount)
        if not data and self._cut is not None:
            raise TransientRegistryError("the connection broke")
        return data

    def close(self) -> None:
        self.closed = True


class FakeTransport:
    """Asks `handler` for every answer, keeps the requests (bodies read whole) and the answers."""

    def __init__(self, handler: Callable[[HttpRequest], FakeResponse]) -> None:
        self._handler = handler
        self.requests: list[HttpRequest] = []
        self.responses: list[FakeResponse] = []

    def send(self, request: HttpRequest) -> FakeResponse:
        if isinstance(request.body, Iterator):
            request.body = b"".join(request.body)
        self.requests.append(request)
        response = self._handler(request)
        self.responses.append(response)
        return response

    def close(self) -> None:
        pass

    @property
    def lines(self) -> list[str]:
        """The requests as `METHOD URL`."""
        return [f"{request.method} {request.url}" for request in self.requests]
