"""The commands' side of the control socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from erofs_builder.errors import FormatError, IntegrityError
from loader.cli.control_http import Answer, ask
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
                with self._ask(method, path, timeout, body, query) as answer:
                    data = answer.read()
                break
            except ConnectionError as error:
                # A worker that was replaced meanwhile; every operation may be repeated.
                if last:
                    raise _hung_up(error) from None
            except TimeoutError:
                raise self._silent(timeout) from None
        document = _parse(data)
        if answer.status != 200:
            raise _error(document)
        return document

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """The lines of an answer that comes in pieces, up to the one that says that it is `finished`."""
        document: Any = {}
        try:
            with self._ask("POST", path, self._timeout, body) as answer:
                if answer.status != 200:
                    raise _error(_parse(answer.read()))
                for line in answer.lines():
                    document = _parse(line)
                    if "error" in document:
                        raise _error(document)
                    yield document
        except TimeoutError:
            raise self._silent(self._timeout) from None
        except ConnectionError as error:
            raise _hung_up(error) from None
        if not document.get("finished"):
            raise _hung_up("in the middle of its answer")

    def _silent(self, seconds: float) -> LoaderError:
        return LoaderError(
            f"the daemon on {self._path} did not answer within {seconds:.0f} s",
            hint="its log says why (`journalctl -u erofs-loader`); its worker may fail to start",
        )

    def _ask(
        self, method: str, path: str, timeout: float, body: Any = None, query: dict[str, str] | None = None
    ) -> Answer:
        target = path + (f"?{urlencode(query)}" if query else "")
        try:
            return ask(self._path, timeout, method, target, json.dumps(body).encode() if body is not None else None)
        except (FileNotFoundError, ConnectionRefusedError):
            raise LoaderError(
                f"no daemon listens on {self._path}",
                hint="systemctl start erofs-loader (or `erofs-loader serve`); --socket names another socket",
            ) from None
        except PermissionError:
            raise LoaderError(f"{self._path}: permission denied", hint="the control socket is root's") from None


def _hung_up(how: object) -> LoaderError:
    return LoaderError(f"the daemon hung up: {how}", hint="a worker of it may have ended: see its log, and try again")


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
