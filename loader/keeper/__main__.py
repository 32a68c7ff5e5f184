"""The keeper's process: `python -m loader.keeper`, started by the supervisor with everything in the environment."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import sys
import time
from typing import NoReturn

from loader.keeper.config import CONFIG_ENV, STORED_ENV, SUPERVISOR_ENV, KeeperConfig
from loader.keeper.fdstore import NOTIFY, FdStore, listen_fds, to_environment
from loader.keeper.journal import CAPACITY
from loader.keeper.keeper import CONTROL, LOCK, SIGNALS, Keeper
from loader.keeper.plane_fanotify import reserve_journaled

NO_KERNEL_SUPPORT = 13
log = logging.getLogger("loader.keeper")
_EXECS = 20  # tries to become the supervisor
_PAUSE = 0.5  # seconds between them
_MISSING = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def main() -> int:
    fds = listen_fds(os.environ, os.getpid())
    reserve_journaled(fds)
    logging.basicConfig(format="keeper: %(message)s", level=logging.INFO)
    config = KeeperConfig.from_json(os.environ[CONFIG_ENV])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = CAPACITY if hard == resource.RLIM_INFINITY else min(hard, CAPACITY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    receiver = fds.pop(NOTIFY) if NOTIFY in fds else os.environ.get("NOTIFY_SOCKET")  # of an older supervisor
    try:
        keeper = Keeper(config, fds, FdStore(receiver, mortal=True))
    except OSError as error:
        log.error("plane %s: %s", config.plane, error)
        return NO_KERNEL_SUPPORT if error.errno in _MISSING else 1
    _watch_supervisor(keeper)
    return keeper.run()


def _watch_supervisor(keeper: Keeper) -> None:
    supervisor = int(os.environ.get(SUPERVISOR_ENV, "0"))
    if not supervisor:
        return
    try:  # killed while this keeper started, it may be reaped already
        pidfd = os.pidfd_open(supervisor)
    except ProcessLookupError:
        orphaned(keeper)
    if os.getppid() != supervisor:
        orphaned(keeper)
    keeper.watch_supervisor(pidfd, lambda: orphaned(keeper))


def orphaned(keeper: Keeper) -> NoReturn:
    """The supervisor is gone. Under systemd the next one gets everything from systemd; else become the supervisor.

    Becoming it is an exec with all descriptors: the new supervisor then starts a keeper that takes over from us.
    """
    if os.environ.get(STORED_ENV):
        os._exit(1)
    log.error("the supervisor is gone: taking its place")
    _hold_signals(keeper)
    keeper.drop_standby()
    if keeper.worker is not None:
        keeper.worker.finish()
    keeper.nursery.close()
    fds = keeper.plane.handed_down() | keeper.host.handed_down() | {CONTROL: keeper.control}
    if keeper.lock is not None:
        fds[LOCK] = keeper.lock
    for fd in fds.values():
        os.set_inheritable(fd, True)
    environment = os.environ | to_environment(fds)
    environment.pop("NOTIFY_SOCKET", None)
    environment.pop(SUPERVISOR_ENV, None)
    for _ in range(_EXECS):
        try:
            os.execve(sys.executable, [sys.executable, "-m", "loader.keeper.supervisor"], environment)
        except OSError as error:  # no memory; or this Python is being replaced, or was removed
            log.error("%s: %s", sys.executable, error)
            time.sleep(_PAUSE)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    keeper.park()  # the last that holds must not end
    os._exit(0)


def _hold_signals(keeper: Keeper) -> None:
    """Have signals wait until the supervisor that this process becomes has handlers; those too that came already."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with contextlib.suppress(BlockingIOError):
        for number in keeper.signals.recv(64):
            os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main())
