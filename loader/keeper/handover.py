"""A parked keeper: the daemon was stopped, mounts stay. It holds the kernel's descriptors, so that the kernel never
reads a hole unasked (zeros in the decoded form, bytes that do not decode in the encoded one); readers wait half a
minute for the next daemon, after that they have what is there and errors for the rest. The next daemon that starts gets
everything from it. A twin, forked from it, holds too, and takes its place if it is killed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import receive_with_fds, send_with_fds
from loader.keeper.readable import readable
from loader.keeper.requests import Pending
from loader.keeper.twin import Twin, fork_twin

if TYPE_CHECKING:
    from loader.keeper.keeper import Keeper

log = logging.getLogger(__name__)
PARKED = "X_EROFS_PARKED"  # to the supervisor: go, this keeper stays
_TIMEOUT = 10.0
_PAUSE = 1.0  # seconds until a twin is tried again that could not be forked
_ATTEMPTS = 10  # at a handover, with parked keepers that are killed
_AGAIN = 0.1  # seconds between them


def places(config: KeeperConfig) -> list[Path]:
    """Where a parked keeper listens: in ROOT, or beside the control socket where nothing can be made in ROOT."""
    root = config.root.stat()
    elsewhere = f"parked-{root.st_dev:x}-{root.st_ino:x}.sock"
    return [config.root / "parked.sock", config.socket.with_name(elsewhere)]


def park(keeper: Keeper) -> None:
    """Serve parked until another daemon has taken over."""
    until = time.monotonic() + keeper.config.grace
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listens = _listen(listener, places(keeper.config))
        twin = fork_twin(lambda: _let_go(keeper))
        if twin is not None:
            keeper.store.notify(f"{PARKED}=1")
            _let_go(keeper)
        while twin is None or not _hold(keeper, listener if listens else None, twin, until):
            if twin is None:  # the first was killed, and this is the twin, in its place
                until = 0.0
                keeper.plane.refuse_orphans()
            else:
                twin.reap()
            twin = fork_twin(lambda: None)
        twin.kill()


def _let_go(keeper: Keeper) -> None:
    """Close what only a keeper with a supervisor has."""
    keeper.store.close()
    os.close(keeper.control)
    if keeper.lock is not None:
        os.close(keeper.lock)
    _detach_standard_streams()


def _hold(keeper: Keeper, listener: socket.socket | None, twin: Twin, until: float) -> bool:
    """Hold, and after `until` answer; true once this process may go, false if the twin died or there is none."""
    kernel, signals = keeper.plane.fileno(), keeper.signals.fileno()
    asked = listener.fileno() if listener else -1
    sources = [fd for fd in (asked, twin.pidfd) if fd >= 0]
    fork_again = math.inf if twin else time.monotonic() + _PAUSE
    while True:
        wait = max(0.0, until - time.monotonic())
        if not wait and kernel not in sources:
            for pending in keeper.requests.take_all():
                keeper.plane.answer_by_presence(pending)
            sources += [kernel, signals]
        ready = readable(sources, _shorter(wait or math.inf, fork_again - time.monotonic()))
        if kernel in ready:
            _refuse(keeper)
        if signals in ready and signal.SIGTERM in os.read(signals, 64) and _may_go(keeper):
            return True
        if listener and asked in ready and _hand_over(keeper, listener, twin):
            return True
        if twin.pidfd in ready or time.monotonic() >= fork_again:
            return False


def _shorter(*waits: float) -> float | None:
    """For `readable`: None is for ever."""
    return None if min(waits) == math.inf else max(0.0, min(waits))


def _may_go(keeper: Keeper) -> bool:
    """Whether no mount is left whose holes would be read as zeros without us; so it is when the machine shuts down,
    which would otherwise wait for this process until its patience ends."""
    state = keeper.state
    try:
        state.drop_gone_mounts(keeper.host.erofs_targets())
    except OSError as error:
        log.error("the machine's mounts: %s", error)
        return False
    used = {number for record in state.mounts.values() for number in record.objects}
    if any(item.holes_read_as_zeros for number, item in state.objects.items() if number in used):
        log.warning("incomplete mounts are still there: staying, to refuse what is missing")
        return False
    state.save()
    _unlink(places(keeper.config))
    return True


def _refuse(keeper: Keeper) -> None:
    for found in keeper.plane.read():
        if isinstance(found, Pending):
            keeper.requests.take(found.id)
            keeper.plane.answer_by_presence(found)


def _listen(listener: socket.socket, paths: list[Path]) -> bool:
    """Listen at the first of these places where a socket can be made; false if there is none: then just hold."""
    mask = os.umask(0o177)
    try:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
                listener.bind(str(path))
                listener.listen(1)
                return True
            except OSError as error:
                log.error("%s: %s", path, error)
    finally:
        os.umask(mask)
    log.error("the next daemon cannot take over: unmount, and kill this process and its twin, before it starts")
    return False


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # a disk that cannot be written keeps the name
            path.unlink(missing_ok=True)


def _hand_over(keeper: Keeper, listener: socket.socket, twin: Twin) -> bool:
    """Give every descriptor to whoever connected; false if it did not take them all.

    The twin is ended before they are taken: should this process be killed then, it must not read events in its place,
    beside the next keeper. Their numbers are the same, and so the answer to the one's could be the other's.
    """
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(_TIMEOUT)
        try:
            for name, fd in keeper.plane.handed_down().items():
                send_with_fds(connection, name.encode(), [fd])
            send_with_fds(connection, b"end", [])
            twin.end()
            taken = connection.recv(16) == b"taken"
        except OSError as error:
            log.error("handover: %s", error)
            return False
        if taken:  # that nobody listens, and the end of the connection, tell that this keeper reads no more
            _unlink(places(keeper.config))
            listener.close()
        return taken


def take_over(config: KeeperConfig, prepare: Callable[[dict[str, int]], None]) -> None:
    """Have `prepare` get the descriptors of a parked keeper, or none when there is none.

    If it raises, that keeper goes on holding. Else it goes, unless it has lost patience, or was killed and has a twin
    in its place: they still listen, and then `prepare` gets theirs.
    """
    prepared = False
    for _ in range(_ATTEMPTS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_TIMEOUT)
            if not _connect(connection, places(config)):
                break
            received = _receive(connection)
            if received is None:
                time.sleep(_AGAIN)
                continue
            prepare(received)
            prepared = True
            if _goes(connection):
                break
    else:
        raise OSError("the parked keeper ends every handover in the middle")
    if not prepared:
        prepare({})


def _connect(connection: socket.socket, paths: list[Path]) -> bool:
    for path in paths:
        with contextlib.suppress(OSError):
            connection.connect(str(path))
            return True
    return False


def _receive(connection: socket.socket) -> dict[str, int] | None:
    """The descriptors, by name; None if whoever sends them ended before the last."""
    fds: dict[str, int] = {}
    while True:
        try:
            name, received = receive_with_fds(connection, 256)
        except ConnectionResetError:
            name, received = b"", []
        if name == b"end":
            return fds
        if not name:
            for fd in fds.values():
                os.close(fd)
            return None
        fds[name.decode()] = received[0]


def _goes(connection: socket.socket) -> bool:
    """Tell a parked keeper that it may go; false if the connection ended, which does not tell whether it does."""
    try:
        connection.send(b"taken")
        connection.recv(1)
    except TimeoutError:  # it is stopped: it will find that and go
        return True
    except OSError:
        pass
    return False


def _detach_standard_streams() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    if null > 2:
        os.close(null)
