"""Descriptors that outlive a process: systemd's descriptor store protocol (sd_notify(3), sd_listen_fds(3)), both ends.

The keeper sends every descriptor it cannot lose through NOTIFY, a socket that it was handed down; the supervisor keeps
them (and passes them on to systemd, where there is one) and hands them to the next keeper by number and name in
environment variables.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping

log = logging.getLogger(__name__)
FDS_ENV = "EROFS_LOADER_FDS"
NOTIFY = "notify"  # the keeper's end of a pair, whose other end its supervisor reads
MAX_FDS = 253  # SCM_MAX_FD of the kernel
_FDS_AT_ONCE = 2000  # of one variable
_SEND_TIMEOUT = 10.0
_GONE = (errno.ECONNREFUSED, errno.ENOTCONN)  # the receiver has died: the first send, and each one after it


class FdStore:
    """The sending end, to an address or through a connected socket's descriptor. With neither everything is a no-op
    (nobody keeps descriptors then).

    `mortal`: the receiving process may have been killed; then too everything is a no-op from there on, and whoever
    sends has to notice by other means. Else that is an OSError.
    """

    def __init__(self, receiver: str | int | None, *, mortal: bool = False) -> None:
        self._socket: socket.socket | None = None
        self._mortal = mortal
        if isinstance(receiver, int):
            self._socket = socket.socket(fileno=receiver)
            self._socket.settimeout(_SEND_TIMEOUT)
        elif receiver:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(_SEND_TIMEOUT)
            with self._survived():
                self._socket.connect("\0" + receiver[1:] if receiver.startswith("@") else receiver)

    def store(self, name: str, fd: int) -> None:
        """Have `fd` kept under `name`; it is safe once this returns."""
        self.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    def remove(self, name: str) -> None:
        self.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def discard(self, name: str) -> None:
        """`remove` that must not fail. A name that stays is no object's, and goes when the next keeper starts."""
        try:
            self.remove(name)
        except OSError as error:
            log.error("descriptor store: %s stays: %s", name, error)

    def notify(self, text: str) -> None:
        """A state change such as READY=1. Nobody to tell is not an error."""
        with contextlib.suppress(OSError):
            self.send(text)

    def beat(self) -> None:
        """A sign of life. Never waits: a stopped supervisor must not stop its keeper."""
        if self._socket is not None:
            with contextlib.suppress(OSError), self._survived():
                self._socket.send(b"WATCHDOG=1", socket.MSG_DONTWAIT)

    def send(self, text: str, fds: list[int] | None = None) -> None:
        if self._socket is not None:
            with self._survived():
                send_with_fds(self._socket, text.encode(), fds or [])

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._mortal or error.errno not in _GONE:
                raise
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    sock.sendmsg([data], rights)


def receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, close-on-exec."""
    data, ancillary, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def parse_fields(data: bytes) -> dict[str, str]:
    """The assignments of an sd_notify message; lines that are none are left out."""
    lines = (line.partition("=") for line in data.decode(errors="replace").splitlines())
    return {key: value for key, equals, value in lines if equals}


def apply(fds: MutableMapping[str, int], fields: Mapping[str, str], received: list[int]) -> None:
    """Keep or drop descriptors as one message says; those not kept are closed."""
    name = fields.get("FDNAME", "")
    if fields.get("FDSTORE") == "1" and name:
        for fd in received:
            old = fds.get(name)
            fds[name] = fd
            if old is not None:
                os.close(old)
        return
    for fd in received:
        os.close(fd)
    if fields.get("FDSTOREREMOVE") == "1" and name in fds:
        os.close(fds.pop(name))


def listen_fds(environment: MutableMapping[str, str], pid: int) -> dict[str, int]:
    """The descriptors handed down, by name: by our supervisor, or by systemd. The variables are removed."""
    items: list[str] = []
    while text := environment.pop(_fds_variable(len(items) // _FDS_AT_ONCE), ""):
        items += text.split(",")
    found = {name: int(number) for name, _, number in (item.partition(":") for item in items)}
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if environment.pop("LISTEN_PID", "") == str(pid) and count.isdigit():
        found.update({name: 3 + number for number, name in enumerate(names[: int(count)])})
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found


def to_environment(fds: Mapping[str, int]) -> dict[str, str]:
    """The variables for a child that inherits `fds`. Several, if there are many: each may have 128 KiB."""
    items = [f"{name}:{fd}" for name, fd in fds.items()]
    return {
        _fds_variable(start // _FDS_AT_ONCE): ",".join(items[start : start + _FDS_AT_ONCE])
        for start in range(0, len(items), _FDS_AT_ONCE)
    }


def _fds_variable(number: int) -> str:
    return f"{FDS_ENV}_{number}" if number else FDS_ENV
