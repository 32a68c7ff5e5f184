"""The control socket: HTTP and JSON over a Unix socket, so that `curl --unix-socket` is client enough.

    GET    /v1/status /v1/stats /v1/images /v1/mounts    /metrics (Prometheus)
    POST   /v1/images    {"image", "form"?, "pinned"?}   DELETE /v1/images?image=…
    POST   /v1/mounts    {"image", "target", "form"?, "domain"?}    DELETE /v1/mounts?target=…[&lazy=1]
    POST   /v1/prefetch  {"image", "paths"?, "form"?}    answers one JSON object a line until it is done
    POST   /v1/trace     {"image"}
    POST   /v1/gc        {"dry_run"?, "everything"?}
    POST   /v1/stop      {"mode"?}

An error is {"error", "hint", "code"} with the exit code that the command ends with. Each connection has its thread.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl

from erofs_builder.errors import FormatError, IntegrityError
from loader.errors import LoaderError, UsageError
from loader.worker.api import Api

log = logging.getLogger(__name__)

MAX_BODY = 1 << 20
_STATUS = {2: 400, 10: 404, 11: 502, 12: 502, 13: 501, 14: 409, 15: 422}
_Arguments = dict[str, Any]
_Handler = Callable[[Api, _Arguments], Any]

# (method, path): handler, allowed arguments with their types
_ROUTES: dict[tuple[str, str], tuple[_Handler, dict[str, type]]] = {
    ("GET", "/v1/status"): (lambda api, _: api.status(), {}),
    ("GET", "/v1/stats"): (lambda api, _: api.stats(), {}),
    ("GET", "/v1/images"): (lambda api, _: api.images(), {}),
    ("GET", "/v1/mounts"): (lambda api, _: api.mounts(), {}),
    ("POST", "/v1/images"): (lambda api, a: api.add_image(**a), {"image": str, "form": str, "pinned": bool}),
    ("DELETE", "/v1/images"): (lambda api, a: api.remove_image(**a), {"image": str}),
    ("POST", "/v1/mounts"): (lambda api, a: api.mount(**a), {"image": str, "target": str, "form": str, "domain": str}),
    ("DELETE", "/v1/mounts"): (lambda api, a: api.umount(**a), {"target": str, "lazy": bool}),
    ("POST", "/v1/prefetch"): (
        lambda api, a: api.prefetch(**{"paths": [], **a}),
        {"image": str, "paths": list, "form": str},
    ),
    ("POST", "/v1/scrub"): (lambda api, _: api.scrub(), {}),
    ("POST", "/v1/trace"): (lambda api, a: api.trace(**a), {"image": str}),
    ("POST", "/v1/gc"): (lambda api, a: api.gc(**a), {"dry_run": bool, "everything": bool}),
    ("POST", "/v1/stop"): (lambda api, a: api.stop(**a), {"mode": str}),
}
_REQUIRED = {
    ("POST", "/v1/images"): {"image"},
    ("DELETE", "/v1/images"): {"image"},
    ("POST", "/v1/mounts"): {"image", "target"},
    ("DELETE", "/v1/mounts"): {"target"},
    ("POST", "/v1/prefetch"): {"image"},
    ("POST", "/v1/trace"): {"image"},
}


class ControlServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves an already listening socket, which belongs to the keeper and outlives this process."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, api: Api) -> None:
        super().__init__(("control", 0), ControlHandler)
        self._listener = listener
        self._listener.setblocking(False)
        self.api = api
        self._answering = 0
        self._answered = threading.Condition()

    def fileno(self) -> int:
        return self._listener.fileno()

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self._listener.accept()  # BlockingIOError if another worker was faster
        connection.setblocking(True)
        connection.settimeout(600)
        return connection, ("control", 0)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._answered:
            self._answering += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._answered:
                self._answering -= 1
                self._answered.notify_all()

    def finish(self, patience: float) -> None:
        """Take no more requests, and give those that were taken `patience` seconds to be answered."""
        self.shutdown()
        with self._answered:
            self._answered.wait_for(lambda: not self._answering, patience)

    def shutdown_request(self, request: Any) -> None:
        try:
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a control connection ended early", exc_info=True)


class ControlHandler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: ControlServer
    server_version = "erofs-loader"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
            self._send(200, "text/plain; version=0.0.4", self.server.api.metrics().encode())
        else:
            self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    def _route(self) -> None:
        try:
            result = self._result()
        except Exception as error:
            status, document = explain(error)
            self._json(status, document)
            return
        if isinstance(result, Iterator):
            self._stream(result)
        else:
            self._json(200, result)

    def _result(self) -> Any:
        path, _, query = self.path.partition("?")
        key = (self.command, path)
        route = _ROUTES.get(key)
        if route is None:
            raise UsageError(f"no {self.command} {path}", hint="docs/control-api.md lists what there is")
        handler, types = route
        return handler(self.server.api, _checked(self._arguments(query), types, _REQUIRED.get(key, set())))

    def _arguments(self, query: str) -> _Arguments:
        arguments: _Arguments = dict(parse_qsl(query))
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 <= length <= MAX_BODY:
                raise UsageError(f"a body of {length} bytes; at most {MAX_BODY} are taken")
            body = json.loads(self.rfile.read(length)) if length else {}
        except (ValueError, RecursionError):
            raise UsageError("the body is not JSON") from None
        if not isinstance(body, dict):
            raise UsageError("the body is not a JSON object")
        return arguments | body

    def _stream(self, reports: Iterator[Any]) -> None:
        """One JSON object a line; an error is the last of them."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        try:
            for report in reports:
                self.wfile.write(json.dumps(report).encode() + b"\n")
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            self.wfile.write(json.dumps(explain(error)[1]).encode() + b"\n")

    def _json(self, status: int, document: Any) -> None:
        self._send(status, "application/json", json.dumps(document).encode() + b"\n")

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "control"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error; what is not foreseen is logged with its traceback."""
    if isinstance(error, LoaderError | FormatError | IntegrityError):
        code = error.exit_code
    else:
        code = 1
        if not isinstance(error, OSError):
            log.error("a control request failed in an unexpected way", exc_info=error)
    document = {"error": str(error) or type(error).__name__, "hint": getattr(error, "hint", None), "code": code}
    return _STATUS.get(code, 500), document


def _checked(arguments: _Arguments, types: dict[str, type], required: set[str]) -> _Arguments:
    """The arguments, each of its type; UsageError otherwise."""
    checked: _Arguments = {}
    for name, value in arguments.items():
        if name not in types:
            raise UsageError(f"unknown argument {name!r}", hint=f"known: {', '.join(types) or 'none'}")
        if types[name] is bool and value in ("0", "1", "true", "false"):
            value = value in ("1", "true")
        items = value if isinstance(value, list) else [value]
        strings = types[name] is bool or all(isinstance(item, str) and _is_path_text(item) for item in items)
        if not isinstance(value, types[name]) or not strings:
            raise UsageError(f"{name} is {value!r}, expected {types[name].__name__}")
        checked[name] = value
    if missing := required - set(checked):
        raise UsageError(f"missing argument: {', '.join(sorted(missing))}")
    return checked


def _is_path_text(text: str) -> bool:
    """Whether a string can be a path or a name at all: no NUL, no lone surrogate."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
