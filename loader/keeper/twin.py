"""A process that does nothing but hold what its parent holds, and that goes on in its place when it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from loader.keeper.readable import readable


class Twin(NamedTuple):
    """`pidfd` becomes readable when the twin dies. False: there is none, for want of room for a process."""

    pid: int
    pidfd: int

    def __bool__(self) -> bool:
        return self.pid > 0

    def reap(self) -> None:
        if self:
            os.waitpid(self.pid, 0)
            os.close(self.pidfd)

    def end(self) -> None:
        """From here on it does nothing any more; it is still to be reaped."""
        if self:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def kill(self) -> None:
        self.end()
        self.reap()


def fork_twin(let_go: Callable[[], None]) -> Twin | None:
    """Fork, with no other thread running. The twin does `let_go` and waits; there, None, once its parent is gone."""
    try:
        parent = os.pidfd_open(os.getpid())
    except OSError:
        return Twin(0, -1)
    try:
        pid = os.fork()
    except OSError:
        os.close(parent)
        return Twin(0, -1)
    if pid:
        os.close(parent)
        return _watched(pid)
    let_go()
    readable([parent])
    os.close(parent)
    return None


def _watched(pid: int) -> Twin:
    try:
        return Twin(pid, os.pidfd_open(pid))
    except OSError:  # nobody would notice its end
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Twin(0, -1)
