"""The keeper's end of the nursery, the process that forks workers (loader/worker/nursery.py)."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from typing import Protocol

from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import receive_with_fds, send_with_fds
from loader.keeper.protocol import CONTROL_FD_ENV, NURSERY_FD_ENV, ROOT_ENV, SOCKET_ENV
from loader.keeper.readable import readable

log = logging.getLogger(__name__)
_PATIENCE = 2.0  # seconds that a fork may take; it takes milliseconds
_PAUSE = 1.0  # seconds between the end of one and the start of the next
_LOADING = 20.0  # seconds until it has to be ready; else workers are started without it
_MAX_PACKET = 64


class Process(Protocol):
    """What a keeper needs of a worker's process; subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def wait(self) -> int | None: ...


class Nursery:
    """The process and its socket, which the keeper's selector watches. Where the configuration has none, workers are
    started without it, as they are when it is gone.
    """

    def __init__(self, config: KeeperConfig, control_fd: int, selector: selectors.BaseSelector) -> None:
        self._config, self._control, self._selector = config, control_fd, selector
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._start_at = self._loaded_at = 0.0
        self.ready = False

    @property
    def loading(self) -> bool:
        """Whether it is worth waiting for."""
        return self._sock is not None and not self.ready and time.monotonic() < self._loaded_at

    def tend(self) -> None:
        """Have one."""
        if self._config.nursery and self._sock is None and time.monotonic() >= self._start_at:
            try:
                self._start()
            except OSError as error:  # the machine has no room for one more process now
                self._failed(error)

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._sock.settimeout(_PATIENCE)
            self._selector.register(self._sock, selectors.EVENT_READ, self._heard)
            self._loaded_at = time.monotonic() + _LOADING
            self._process = subprocess.Popen(
                self._config.nursery,
                env=worker_environment(self._config, self._control) | {NURSERY_FD_ENV: str(theirs.fileno())},
                pass_fds=(theirs.fileno(), self._control),
                stdin=subprocess.DEVNULL,
            )

    def _heard(self) -> None:
        """Its socket is readable: it is ready, or gone."""
        try:
            if self._ask(None, [])[0] != b"ready":
                raise ConnectionError("said something that nobody asked for")
            self.ready = True
        except OSError as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.error("the nursery: %s", error)
        self.close()
        self._start_at = time.monotonic() + _PAUSE

    def fork(self, theirs: socket.socket) -> Process | None:
        """A worker with this end of its socket; None if it must be started otherwise."""
        if not self.ready:
            return None
        try:
            pid, fds = self._ask(b"fork", [theirs.fileno()])
            return _Forked(self, int(pid), fds[0])
        except (OSError, ValueError, IndexError) as error:
            self._failed(error)
            return None

    def reap(self, pid: int) -> int | None:
        """The exit status of a worker that has ended; None if it was not this nursery's."""
        if not self.ready:
            return None
        try:
            answer, _ = self._ask(b"reap %d" % pid, [])
            return None if answer == b"unknown" else int(answer)
        except (OSError, ValueError) as error:
            self._failed(error)
            return None

    def _ask(self, question: bytes | None, fds: list[int]) -> tuple[bytes, list[int]]:
        assert self._sock is not None
        if question is not None:
            send_with_fds(self._sock, question, fds)
        answer, received = receive_with_fds(self._sock, _MAX_PACKET)
        if not answer:
            raise ConnectionResetError("ended")
        return answer, received

    def close(self) -> None:
        """End it; its workers go on. The next `tend` starts one with the configuration and the code of then."""
        self.ready = False
        if self._sock is not None:
            self._selector.unregister(self._sock)
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class _Forked:
    """A worker's process. It is the nursery's child, so a descriptor stands for it here."""

    def __init__(self, nursery: Nursery, pid: int, pidfd: int) -> None:
        self._nursery, self._pidfd = nursery, pidfd
        self.pid = pid

    def send_signal(self, sig: int, /) -> None:
        signal.pidfd_send_signal(self._pidfd, sig)

    def wait(self) -> int | None:
        """Until it has ended: its status, if that can be known. To be called once."""
        readable([self._pidfd])
        os.close(self._pidfd)
        return self._nursery.reap(self.pid)


def worker_environment(config: KeeperConfig, control_fd: int) -> dict[str, str]:
    """What every worker finds in its environment, but for its own socket."""
    environment = os.environ | config.worker_env
    environment |= {CONTROL_FD_ENV: str(control_fd), ROOT_ENV: str(config.root), SOCKET_ENV: str(config.socket)}
    environment.pop("NOTIFY_SOCKET", None)
    return environment
