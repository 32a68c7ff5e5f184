"""Waiting for a few descriptors in a process that has many: numbers from 1024 on are too large for select(2)."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterable


def readable(fds: Iterable[int], timeout: float | None = None) -> set[int]:
    """Those that can be read, or have failed, as soon as there is one; none after `timeout` seconds."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    found = poll.poll(None if timeout is None else timeout * 1000)
    for fd, what in found:
        if what & select.POLLNVAL:  # else whoever waits in a loop would never wait again
            raise OSError(errno.EBADF, f"descriptor {fd}: {os.strerror(errno.EBADF)}")
    return {fd for fd, _ in found}
