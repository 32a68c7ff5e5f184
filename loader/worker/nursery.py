"""The nursery: `python -m loader.worker.nursery`. It has loaded all that a worker needs, and forks workers when told.

A worker that is forked here is there a tenth of a second sooner than one that starts from nothing, and shares its
code's memory with the others. The nursery has one thread, parses nothing but its keeper's packets, and ends with it
(loader/keeper/nursery.py is the other end).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from loader.keeper.fdstore import receive_with_fds, send_with_fds
from loader.keeper.protocol import KEEPER_FD_ENV, NURSERY_FD_ENV
from loader.worker import __main__ as worker

_MAX_PACKET = 64


def main() -> int:
    """Fork on `fork`, with the worker's socket: answers pid and pidfd. Reap on `reap PID`: answers the status."""
    keeper = socket.socket(fileno=int(os.environ.pop(NURSERY_FD_ENV)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor
    importlib.import_module("loader.registry.session")
    gc.collect()
    gc.freeze()  # so that collections in workers copy no pages of what is shared
    keeper.send(b"ready")
    while True:
        packet, fds = receive_with_fds(keeper, _MAX_PACKET)
        if not packet:
            return 0
        if packet == b"fork" and len(fds) == 1:
            _fork(keeper, fds[0])
        else:
            keeper.send(_reap(int(packet.removeprefix(b"reap "))).encode())


def _fork(keeper: socket.socket, theirs: int) -> None:
    """A worker whose end of its socket is `theirs`."""
    pid = os.fork()
    if not pid:
        keeper.close()
        os.environ[KEEPER_FD_ENV] = str(theirs)
        _become_worker()
    os.close(theirs)
    pidfd = os.pidfd_open(pid)
    send_with_fds(keeper, str(pid).encode(), [pidfd])
    os.close(pidfd)


def _become_worker() -> None:
    """Never returns."""
    try:
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text("erofs-worker")
        worker.run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _reap(pid: int) -> str:
    """The exit status of a worker that has ended, negative for a signal; a former nursery's is not ours to know."""
    try:
        return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    except ChildProcessError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
