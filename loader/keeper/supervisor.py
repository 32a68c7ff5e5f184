"""The supervisor: the process that `erofs-loader serve` becomes. It starts keepers and keeps their descriptors.

It never reads an event and never answers one: it only holds, so that the kernel's group stays open and readers wait
while a keeper that died is replaced. Descriptors come in through systemd's descriptor store protocol on a socket whose
other end each keeper gets, and are passed on to systemd where that listens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loader.errors import BusyError, LoaderError
from loader.keeper import fence, handover
from loader.keeper.config import CONFIG_ENV, STORED_ENV, SUPERVISOR_ENV, KeeperConfig
from loader.keeper.fdstore import NOTIFY, FdStore, apply, listen_fds, parse_fields, receive_with_fds, to_environment
from loader.keeper.host import Host, find_host
from loader.keeper.keeper import CONTROL, LOCK, SIGNALS
from loader.keeper.last_guard import fence_held
from loader.keeper.plane_cachefiles import DEVICE
from loader.keeper.plane_fanotify import GROUP, JOURNAL
from loader.keeper.state import State
from loader.keeper.workers import Backoff

log = logging.getLogger(__name__)
_LOCK_PATIENCE = 5.0  # seconds: a keeper whose supervisor died under systemd needs a moment to go
_SILENCE = 20.0  # seconds without a sign of life after which a keeper is killed
_TICK = 1.0
_SHORT_LIFE = 1.0  # a keeper that served no longer than this counts as a crash loop; a killed one is replaced at once
_STOP_PATIENCE = 30.0  # seconds after the first one that died in a stop in which others are started to end it in order


def run(config: KeeperConfig) -> int:
    """Serve until told to stop; the exit status. BusyError: another daemon serves this root."""
    config.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fds = listen_fds(os.environ, os.getpid())
    host = find_host(fds)
    lock = fds.pop(LOCK, None)
    if lock is None:
        lock = _lock(config.root)
    supervisor = Supervisor(config, fds, lock, host)
    handover.take_over(config, supervisor.prepare)
    status = supervisor.run()
    if status:  # no keeper could be brought up, nobody guards what is mounted
        fence.fence_unguarded(State.load(config.root), host)
    return status


class Supervisor:
    """Starts keepers, one after the other, until one leaves in order."""

    def __init__(self, config: KeeperConfig, fds: dict[str, int], lock: int, host: Host) -> None:
        self._config, self._fds, self._lock, self._host = config, fds, lock, host
        self._upstream = FdStore(os.environ.get("NOTIFY_SOCKET"))
        self._stored = "NOTIFY_SOCKET" in os.environ
        # A pair, and no name in a directory: that could not be made on a full disk, when a keeper takes our place.
        self._notify, self._keepers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setblocking(False)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._heard = 0.0
        self._served = math.inf  # since when this keeper serves
        self._ready = self._parked = self._stopping = False
        self._give_up_at = math.inf
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._notify, selectors.EVENT_READ, self._on_notify)
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ, self._on_signals)
        self._handlers: dict[signal.Signals, Any] = {}

    def prepare(self, received: dict[str, int]) -> None:
        """Everything that may fail, while a parked keeper, if `received` is of one, still guards what is mounted."""
        for name, fd in received.items():
            apply(self._fds, {"FDSTORE": "1", "FDNAME": name}, [fd])
        check_plane(self._config.plane, self._fds)
        if not guarded(self._fds):
            self._fence_unguarded()
        self._have_control()
        for name, fd in self._fds.items():  # what systemd does not have yet
            self._upstream.store(name, fd)
        self._catch_signals()

    def _fence_unguarded(self) -> None:
        """Fence, with nothing in hand that guards. A group without its journal does not, and would have the fence wait
        for an answer of this very process."""
        for name in {GROUP, JOURNAL} & set(self._fds):
            self._upstream.discard(name)
            os.close(self._fds.pop(name))
        fence.fence_unguarded(State.load(self._config.root), self._host)

    def _have_control(self) -> None:
        """The listening socket; a new one, should its name be gone: nobody would find that one."""
        if CONTROL in self._fds and self._config.socket.is_socket():
            return
        try:
            listener = _listen(self._config.socket)
        except (OSError, LoaderError) as error:
            if CONTROL not in self._fds:
                raise
            log.error("%s: %s", self._config.socket, error)  # to end would be worse than not to be found
            return
        self._upstream.remove(CONTROL)
        apply(self._fds, {"FDSTORE": "1", "FDNAME": CONTROL}, [listener])

    def _catch_signals(self) -> None:
        if not self._handlers:
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a keeper that takes our place has them blocked

    def run(self) -> int:
        """After `prepare`: the exit status."""
        took_over = guarded(self._fds)  # mounts depend on what we hold: giving up would let their holes be read
        backoff = Backoff()
        try:
            while True:
                status = self._run_keeper()
                if self._parked or status == 0:
                    return 0
                if not (self._ready or took_over):
                    return max(status, 1)
                if self._gives_up():
                    self._fence_held()
                    return max(status, 1)
                log.error("the keeper ended with status %d: starting the next", status)
                self._fence_what_was_lost()
                self._wait(backoff.wait(time.monotonic() - self._served < _SHORT_LIFE))
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._close()

    def _wait(self, seconds: float) -> None:
        """Between two keepers: a stop is heard of also where none can be started."""
        until = time.monotonic() + seconds
        while True:
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                key.data()
            if time.monotonic() >= until:
                return

    def _gives_up(self) -> bool:
        """Whether a stop has to do without a keeper that leaves in order."""
        if self._stopping and self._give_up_at == math.inf:
            self._give_up_at = time.monotonic() + _STOP_PATIENCE
        return time.monotonic() > self._give_up_at

    def _fence_held(self) -> None:
        if GROUP in self._fds and JOURNAL in self._fds:
            fence_held(self._fds[GROUP], self._fds[JOURNAL], State.load(self._config.root), self._host)

    def _fence_what_was_lost(self) -> None:
        """A keeper whose descriptors did not reach us was the only one that held them."""
        if self._ready and not guarded(self._fds):
            log.error("what the keeper held was lost with it")
            self._fence_unguarded()

    def _run_keeper(self) -> int:
        """One keeper, from its start to its end: its exit status."""
        try:
            pidfd = self._start_keeper()
        except (OSError, subprocess.SubprocessError) as error:  # a limit of processes; an upgrade of Python
            log.error("no keeper can be started: %s", error)
            return 1
        ended: list[bool] = []
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: ended.append(True))
        try:
            if self._stopping:  # the one before it did not live to do it
                self._signal(signal.SIGTERM)
            while not ended and not self._parked:
                for key, _ in self._selector.select(_TICK):
                    key.data()
                self._watch_silence()
            return 0 if self._parked else self._bury()
        finally:
            self._selector.unregister(pidfd)
            os.close(pidfd)

    def _start_keeper(self) -> int:
        """Start one; its pidfd. Until it has handlers of its own signals wait: the default is to die of them."""
        inherited = self._fds | {LOCK: self._lock, NOTIFY: self._keepers_end.fileno()} | self._host.handed_down()
        environment = (
            os.environ
            | to_environment(inherited)
            | {
                CONFIG_ENV: self._config.to_json(),
                SUPERVISOR_ENV: str(os.getpid()),
                STORED_ENV: "1" if self._stored else "",
            }
        )
        environment.pop("NOTIFY_SOCKET", None)
        self._heard = time.monotonic()
        self._served = math.inf
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "loader.keeper"],
                env=environment,
                pass_fds=tuple(inherited.values()),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            return os.pidfd_open(self._keeper.pid)
        except OSError:
            self._keeper.kill()
            self._bury()
            raise

    def _bury(self) -> int:
        """After a keeper's end: what it had still sent, and whom it left behind."""
        assert self._keeper is not None
        status = self._keeper.wait()
        try:
            os.killpg(self._keeper.pid, signal.SIGKILL)  # its workers
        except ProcessLookupError:
            pass
        while self._on_notify():
            pass
        return status

    def _watch_silence(self) -> None:
        if self._keeper is not None and time.monotonic() - self._heard > _SILENCE:
            log.error("no sign of life from the keeper for %.0f s: killed", _SILENCE)
            self._keeper.kill()
            self._heard = time.monotonic()

    def _on_notify(self) -> bool:
        """One message of the keeper; false when there is none."""
        try:
            data, received = receive_with_fds(self._notify, 4096)
        except BlockingIOError:
            return False
        fields = parse_fields(data)
        self._heard = time.monotonic()
        if handover.PARKED in fields:
            self._parked = True
        elif fields:
            try:
                self._upstream.send(data.decode(errors="replace"), received)
            except OSError as error:
                log.error("systemd's descriptor store: %s", error)
        if fields.get("READY") == "1":
            self._ready = True
            self._served = min(self._served, self._heard)
        apply(self._fds, fields, received)
        return True

    def _on_signals(self) -> None:
        for number in self._wakeup[0].recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True
                number = signal.SIGTERM
            if number in SIGNALS:
                self._signal(number)

    def _signal(self, number: int) -> None:
        if self._keeper is not None and self._keeper.poll() is None:
            self._keeper.send_signal(number)

    def _close(self) -> None:
        """Leave nothing behind, but what a parked keeper holds."""
        self._selector.close()
        for end in (self._notify, self._keepers_end, *self._wakeup):
            end.close()
        for fd in self._fds.values():
            os.close(fd)
        os.close(self._lock)
        if not self._stored:  # else the listening socket is in the store, and a restart goes on with it
            with contextlib.suppress(OSError):  # a disk that cannot be written keeps the name
                self._config.socket.unlink(missing_ok=True)
        self._upstream.close()


def _lock(root: Path) -> int:
    """The lock of a root, held by supervisor and keeper."""
    path = root / "loader.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(fd)
                raise BusyError(f"{root}: another daemon serves this cache", "stop it, or use another --root") from None
            time.sleep(0.05)


def guarded(fds: Mapping[str, int]) -> bool:
    """Whether these are what mounts of an earlier start depend on."""
    return (GROUP in fds and JOURNAL in fds) or DEVICE in fds


def check_plane(plane: str, fds: Mapping[str, int]) -> None:
    """LoaderError: they are another plane's."""
    held = "fanotify" if GROUP in fds else "cachefiles" if DEVICE in fds else plane
    if held == plane:
        return
    raise LoaderError(
        f"mounts of plane {held} are still held, cannot serve plane {plane}",
        "start with the plane of before, stop with --on-stop umount, then change it",
    )


def _listen(path: Path) -> int:
    """The listening control socket, for root only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        raise BusyError(f"{path}: another daemon answers there", "stop it, or use another --socket")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _bind_private(listener, path)
        listener.listen(128)
        return listener.detach()


def _bind_private(sock: socket.socket, path: Path) -> None:
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG and "too long" not in str(error):
            raise
        raise LoaderError(f"{path}: too long for a Unix socket", "use a shorter path") from None
    finally:
        os.umask(mask)


def main() -> int:
    """A keeper whose supervisor died becomes it, through here."""
    logging.basicConfig(format="supervisor: %(message)s", level=logging.INFO)
    return run(KeeperConfig.from_json(os.environ[CONFIG_ENV]))


if __name__ == "__main__":
    sys.exit(main())
