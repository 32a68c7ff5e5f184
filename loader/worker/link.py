"""The worker's end of the keeper's socket: answers go out, packets come in, calls wait for their result."""

from __future__ import annotations

import array
import errno as numbers
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from loader.errors import BusyError, KernelSupportError, LoaderError, NotFoundError
from loader.keeper.protocol import (
    MAX_PACKET,
    PRESENCE,
    Answer,
    Kind,
    Request,
    pack_answer,
    pack_json,
    unpack,
    unpack_request,
)

_ANCILLARY = socket.CMSG_SPACE(4 * array.array("i").itemsize)
Packet = tuple[Kind, Request | Answer | dict[str, Any], int | None]


class CallError(LoaderError):
    """The keeper could not do what it was asked; `errno` is the kernel's word on it."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class Link:
    """One connection to the keeper. Sending is safe from any thread, one thread reads `packets`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tokens = itertools.count(1)
        self._calls: dict[int, Future[tuple[dict[str, Any], int | None]]] = {}
        self._lock = threading.Lock()

    def packets(self) -> Iterator[Packet]:
        """Every packet with its descriptor, but for RESULTs, which go to their callers. Ends with the keeper."""
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(MAX_PACKET, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                return
            if not data:
                return
            if not ancillary and not flags & socket.MSG_TRUNC and (plain := unpack_request(data)) is not None:
                yield *plain, None
                continue
            fds = _descriptors(ancillary)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 2:
                raise ValueError("a packet of the keeper was cut off")
            kind, body = unpack(data)
            fd = fds[0] if fds else None
            if len(fds) == 2 and isinstance(body, dict):
                body[PRESENCE] = fds[1]
            if kind is Kind.RESULT and isinstance(body, dict):
                self._resolve(body, fd)
            elif kind is Kind.PING:
                self._send(pack_json(Kind.PONG, {}))
            else:
                yield kind, body, fd

    def answer(self, request: int, errno: int) -> None:
        """End a request. Nothing happens if the keeper is gone: its successor asks again."""
        self._send(pack_answer(Answer(request, errno)))

    def opened(self, request: int, size: int) -> None:
        """Answer a cachefiles OPEN with the object's size, or -errno."""
        self._send(pack_json(Kind.OPENED, {"id": request, "size": size}))

    def call(self, name: str, timeout: float = 60.0, /, **arguments: Any) -> tuple[dict[str, Any], int | None]:
        """Have the keeper do something; its result and descriptor. CallError carries its errno. Not for the reader."""
        token = next(self._tokens)
        future: Future[tuple[dict[str, Any], int | None]] = Future()
        with self._lock:
            self._calls[token] = future
        try:
            self._send(pack_json(Kind.CALL, {"token": token, "call": name, **arguments}))
            result, fd = future.result(timeout)
        except TimeoutError:
            raise BusyError(f"the keeper did not finish {name} within {timeout:.0f} s") from None
        finally:
            with self._lock:
                self._calls.pop(token, None)
        if error := int(result.get("errno", 0)):
            raise CallError(str(result.get("message") or os.strerror(error)), error)
        return result, fd

    def close(self) -> None:
        self._socket.close()

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _resolve(self, body: dict[str, Any], fd: int | None) -> None:
        with self._lock:
            future = self._calls.pop(int(body.get("token", 0)), None)
        if future is not None:
            future.set_result((body, fd))
        else:
            for left in (fd, body.get(PRESENCE)):
                if left is not None:
                    os.close(left)


def as_loader_error(error: CallError, what: str) -> LoaderError:
    """A keeper's errno as the error with the right exit code."""
    if error.errno in (numbers.EBUSY, numbers.EEXIST):
        return BusyError(f"{what}: {error}")
    if error.errno in (numbers.ENOENT, numbers.ENOTDIR):
        return NotFoundError(f"{what}: {error}")
    if error.errno in (numbers.EOPNOTSUPP, numbers.ENODEV, numbers.ENOSYS, numbers.EINVAL):
        return KernelSupportError(f"{what}: {error}", hint="`erofs-loader probe` says what this kernel can do")
    return LoaderError(f"{what}: {error}")


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()
