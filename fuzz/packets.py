"""Targets for what comes over sockets and from the kernel: control requests, packets, messages, descriptors' names."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cachefiles import wire as cachefiles_wire
from fanotify import wire as fanotify_wire
from loader.keeper import fdstore
from loader.keeper.calls import Calls
from loader.keeper.keeper import Keeper
from loader.keeper.mounting import Mounter
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.protocol import MAX_PACKET, Answer, Kind, Request, pack_answer, pack_json, pack_request, unpack
from loader.keeper.requests import Pending, RequestTable
from loader.keeper.state import Object
from loader.worker.control import ControlHandler
from loader.worker.images import canonical

ALLOWED: tuple[type[Exception], ...] = ()


class _Api:
    """Has every operation; does with its arguments what costs nothing."""

    def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
        return self._anything

    def _anything(self, **arguments: Any) -> dict[str, Any]:
        if "image" in arguments:
            canonical(arguments["image"])
        return arguments

    def metrics(self) -> str:
        return ""

    def prefetch(self, image: str, paths: list[str], form: str | None = None) -> Iterator[dict[str, Any]]:
        yield {"paths": paths}


class _Connection:
    """A connection whose other end sends the input and then nothing more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.sent = bytearray()

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._data)

    def sendall(self, data: bytes) -> None:
        self.sent += data


class _Server:
    api = _Api()


def control(data: bytes) -> None:
    """A connection to the control socket: an answer that is HTTP, and never "something unexpected"."""
    connection = _Connection(data)
    ControlHandler(connection, ("control", 0), _Server())  # type: ignore[arg-type]
    if not connection.sent:
        return
    head, _, body = bytes(connection.sent).partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/") and b"application/json" in head:
        document = json.loads(body)
        assert not (isinstance(document, dict) and document.get("code") == 1), document


def packet(data: bytes) -> None:
    """A packet between keeper and worker, either way."""
    try:
        kind, body = unpack(data)
    except ValueError:
        return
    if isinstance(body, Request):
        assert pack_request(body) == data
    elif isinstance(body, Answer):
        assert pack_answer(body) == data
    elif len(data) * 6 < MAX_PACKET:
        assert unpack(pack_json(kind, body))[0] is kind


class _Plane(FanotifyPlane):
    """Makes objects of nothing."""

    name = "fanotify"

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.counters = {}
        self.writers = {}

    def create(self, name: str, path: str, form: str, size: int) -> Object:
        item = Object(1, "fanotify", size=size, name=name, path=path, form=form)
        self.writers[1] = 0
        return item

    def release(self, object_id: int) -> None:
        raise OSError(2, f"no object {object_id}")

    complete = mark = release

    def lend(self, object_id: int) -> int | None:
        return None

    def idle(self, object_id: int, ranges: Iterable[tuple[int, int]]) -> list[int]:
        return [number for number, (start, end) in enumerate(ranges) if start < end]

    def answer(self, pending: Pending, error: int) -> None:
        assert isinstance(error, int)


class _State:
    path = Path("/nonexistent/keeper.json")
    generation = 1
    objects: dict[int, Object] = {}
    mounts: dict[str, Any] = {}
    fenced: list[Any] = []

    def save(self) -> None: ...

    def save_added(self, objects: Iterable[Object], mounts: Iterable[object] = ()) -> None: ...

    def drop_gone_mounts(self, there: set[str]) -> None:
        self.mounts.clear()


class _Background:
    def run(self, call: object, done: Callable[[OSError | None], None]) -> None:
        done(None)


class _Worker:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, packet: bytes, fd: int | None = None, bitmap: int | None = None) -> None:
        self.sent.append(packet)


class _Config:
    on_stop = "keep"


class _Keeper(Keeper):
    """A keeper without a kernel."""

    def __init__(self) -> None:
        self.config = _Config()  # type: ignore[assignment]
        self.requests = RequestTable()
        self.state = _State()  # type: ignore[assignment]
        self.plane = _Plane(self)
        self.calls = Calls(self)
        self.mounter = Mounter(self.state, _Background(), None, "fanotify")  # type: ignore[arg-type]
        self.mounter.refresh = lambda: None  # type: ignore[method-assign]
        self.worker = _Worker()  # type: ignore[assignment]
        self.worker_deaths = 0

    def _update_interest(self, worker: object) -> None: ...

    def leave(self, mode: str) -> None: ...


def keeper(data: bytes) -> None:
    """Packets of a worker that has gone mad (split at NULs followed by a newline): the keeper stays."""
    subject = _Keeper()
    subject.requests.add(1, 0, 4096, 7)
    subject.requests.add(1, 0, 0, 8, opening=True)
    for part in data.split(b"\0\n"):
        subject._on_packet(subject.worker, part)  # type: ignore[arg-type]
    for sent in subject.worker.sent:  # type: ignore[union-attr]
        assert len(sent) <= MAX_PACKET and unpack(sent)[0] is Kind.RESULT


def fanotify(data: bytes) -> None:
    """What a read(2) of a fanotify group gave."""
    try:
        events = list(fanotify_wire.parse_events(data))
    except ValueError:
        return
    assert len(events) * fanotify_wire.METADATA.size <= len(data)


def cachefiles(data: bytes) -> None:
    """What a read(2) of /dev/cachefiles gave."""
    try:
        message = cachefiles_wire.parse_message(data)
    except ValueError:
        return
    if isinstance(message, cachefiles_wire.Open):
        assert len(message.volume) + 1 + len(message.cookie) + 32 == len(data)


def notify(data: bytes) -> None:
    """A message to the descriptor store."""
    fds: dict[str, int] = {}
    fdstore.apply(fds, fdstore.parse_fields(data), [])
    assert not fds
