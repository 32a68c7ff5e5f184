"""The commands' side of the control socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from erofs_builder.errors import FormatError, IntegrityError
from loader.errors import BusyError, KernelSupportError, LoaderError, NotFoundError, RegistryError, UsageError

# A query reads what the daemon has in memory: a minute covers any restart of its worker.
_QUERY_SECONDS = 60.0

_ERRORS: dict[int, type[LoaderError]] = {
    2: UsageError,
    10: NotFoundError,
    11: RegistryError,
    13: KernelSupportError,
    14: BusyError,
}


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Requests to the daemon that listens on `path`. A failure there is raised here, with the same exit code."""

    def __init__(self, path: Path, timeout: float = 600.0) -> None:
        self._path = path
        self._timeout = timeout

    def request(self, method: str, path: str, body: Any = None, query: dict[str, str] | None = None) -> Any:
        """The answer to one request, parsed."""
        timeout = min(self._timeout, _QUERY_SECONDS) if method == "GET" else self._timeout
        for last in (False, True):
            try:
                with closing(_Connection(self._path, timeout)) as connection:
                    response = self._send(connection, method, path, body, query)
                    data = response.read()
                break
            except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
                # A worker that was replaced meanwhile; every operation may be repeated.
                if last:
                    raise LoaderError(f"the daemon hung up: {error!r}", hint="see its log") from None
            except TimeoutError:
                raise self._silent(timeout) from None
        document = _parse(data)
        if response.status != 200:
            raise _error(document)
        return document

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """The lines of an answer that comes in pieces."""
        try:
            with closing(_Connection(self._path, self._timeout)) as connection:
                response = self._send(connection, "POST", path, body, None)
                if response.status != 200:
                    raise _error(_parse(response.read()))
                while line := response.readline():
                    document = _parse(line)
                    if "error" in document:
                        raise _error(document)
                    yield document
        except TimeoutError:
            raise self._silent(self._timeout) from None

    def _silent(self, seconds: float) -> LoaderError:
        return LoaderError(
            f"the daemon on {self._path} did not answer within {seconds:.0f} s",
            hint="its log says why (`journalctl -u erofs-loader`); its worker may fail to start",
        )

    def _send(
        self, connection: _Connection, method: str, path: str, body: Any, query: dict[str, str] | None
    ) -> http.client.HTTPResponse:
        url = path + (f"?{urlencode(query)}" if query else "")
        try:
            connection.request(method, url, json.dumps(body) if body is not None else None)
            return connection.getresponse()
        except (FileNotFoundError, ConnectionRefusedError):
            raise LoaderError(
                f"no daemon listens on {self._path}",
                hint="start one with `erofs-loader serve`, or name its socket with --socket",
            ) from None
        except PermissionError:
            raise LoaderError(f"{self._path}: permission denied", hint="the control socket is root's") from None


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise LoaderError(f"the daemon sent something else than JSON: {data[:80]!r}") from None


def _error(document: Any) -> Exception:
    message, hint, code = str(document.get("error")), document.get("hint"), document.get("code")
    if code == 12:
        return IntegrityError(message)
    if code == 15:
        return FormatError(message)
    return _ERRORS.get(code, LoaderError)(message, hint)
