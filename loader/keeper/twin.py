"""A process that does nothing but hold what its parent holds, and that goes on in its place when it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from loader.keeper.readable import readable


class Twin(NamedTuple):
    """`pidfd` becomes readable when the twin dies."""

    pid: int
    pidfd: int

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.reap()


def fork_twin(let_go: Callable[[], None]) -> Twin | None:
    """Fork, with no other thread running. The twin does `let_go` and waits; there, None, once its parent is gone."""
    parent = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        os.close(parent)
        return Twin(pid, os.pidfd_open(pid))
    let_go()
    readable([parent])
    os.close(parent)
    return None
