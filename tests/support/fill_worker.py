"""A worker of a few lines for tests of the keeper: fills what is asked from whole files, and does calls for the test.

Object names are file names in the directory of FILL_SOURCE. FILL_DELAY (seconds) is slept before each fill. The control
socket takes one JSON object a connection and returns the keeper's RESULT. What the test may want to break:
a file named `hole` in FILL_SOURCE makes it answer without writing, `silent` makes it answer nothing, `refuse` errors,
`crash` makes it end when it starts.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cachefiles import AlignedWriter
from loader.keeper.fdstore import receive_with_fds
from loader.keeper.protocol import (
    CONTROL_FD_ENV,
    KEEPER_FD_ENV,
    MAX_PACKET,
    Answer,
    Kind,
    Request,
    pack_answer,
    pack_json,
    unpack,
)

UNIT = 128 * 1024


class FillWorker:
    def __init__(self) -> None:
        self.keeper = socket.socket(fileno=int(os.environ[KEEPER_FD_ENV]))
        self.control = socket.socket(fileno=int(os.environ[CONTROL_FD_ENV]))
        self.source = Path(os.environ["FILL_SOURCE"])
        self.delay = float(os.environ.get("FILL_DELAY", "0"))
        self.objects: dict[int, tuple[str, int, dict[str, Any]]] = {}
        self.results: dict[int, Any] = {}
        self.arrived = threading.Condition()
        self.tokens = 0
        self.answering = threading.Lock()

    def run(self) -> None:
        started = False
        if (self.source / "crash").exists():
            return
        while True:
            packet, fds = receive_with_fds(self.keeper, MAX_PACKET)
            if not packet:
                return
            if not started:
                threading.Thread(target=self.serve_control, daemon=True).start()
                started = True
            kind, body = unpack(packet)
            self.handle(kind, body, fds[0] if fds else -1)

    def handle(self, kind: Kind, body: Request | Answer | dict[str, Any], fd: int) -> None:
        if isinstance(body, Request):
            threading.Thread(target=self.fill, args=(body,), daemon=True).start()
        elif isinstance(body, Answer):
            raise ValueError("an ANSWER from the keeper")
        elif kind is Kind.OBJECT:
            self.objects[body["object"]] = (body.get("name") or body["cookie"], fd, body)
        elif kind is Kind.OPEN:
            self.open(body, fd)
        elif kind is Kind.CLOSED:
            _, writer, _ = self.objects.pop(body["object"])
            os.close(writer)
        elif kind is Kind.PING:
            self.keeper.send(pack_json(Kind.PONG, {}))
        elif kind is Kind.RESULT:
            with self.arrived:
                self.results[body["token"]] = (body, fd)
                self.arrived.notify_all()

    def open(self, body: dict[str, Any], fd: int) -> None:
        path = self.source / body["cookie"]
        self.objects[body["object"]] = (body["cookie"], fd, body | {"plane": "cachefiles"})
        size = path.stat().st_size if path.exists() else -errno.ENOENT
        self.keeper.send(pack_json(Kind.OPENED, {"id": body["id"], "size": size}))

    def fill(self, request: Request) -> None:
        name, writer, body = self.objects[request.object]
        if (self.source / "silent").exists():
            return
        time.sleep(self.delay)
        if (self.source / "refuse").exists():
            self.keeper.send(pack_answer(Answer(request.id, errno.ENETUNREACH)))
            return
        if not (self.source / "hole").exists():
            start = request.offset - request.offset % UNIT
            end = request.offset + request.length
            with open(self.source / name, "rb") as file:
                data = os.pread(file.fileno(), end + -end % UNIT - start, start)
            if body.get("plane") == "cachefiles":
                AlignedWriter(len(data)).write(writer, data, start)
            else:
                assert os.pwrite(writer, data, start) == len(data)
        self.keeper.send(pack_answer(Answer(request.id, 0)))

    def serve_control(self) -> None:
        while True:
            connection, _ = self.control.accept()
            with connection:
                with self.answering:
                    body = json.loads(connection.recv(MAX_PACKET))
                    if body["call"] == "pid":
                        answer = {"errno": 0, "pid": os.getpid(), "keeper": os.getppid()}
                    else:
                        answer = self.call(body)
                    connection.sendall(json.dumps(answer).encode())

    def call(self, body: dict[str, Any]) -> Any:
        self.tokens += 1
        token = self.tokens
        self.keeper.send(pack_json(Kind.CALL, body | {"token": token}))
        with self.arrived:
            self.arrived.wait_for(lambda: token in self.results)
            result, fd = self.results.pop(token)
        if body["call"] == "create" and result["errno"] == 0:
            self.objects[result["object"]] = (body["name"], fd, {"plane": "fanotify"})
        return result


def leave(*_: object) -> None:
    """Answers under way, such as that to "stop", go out first; their RESULT may still have to be read."""
    threading.Timer(0.2, os._exit, (0,)).start()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    worker = FillWorker()
    worker.run()
    worker.answering.acquire(timeout=5)
    sys.exit(0)
