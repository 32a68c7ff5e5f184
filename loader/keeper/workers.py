"""Worker processes: the one that serves, and the next one, started ahead of need."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator

from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import send_with_fds
from loader.keeper.nursery import Nursery, Process, worker_environment
from loader.keeper.protocol import KEEPER_FD_ENV, MAX_PACKET, Kind, pack_json

log = logging.getLogger(__name__)
_BUFFER = 1 << 20
_packet = memoryview(bytearray(MAX_PACKET))  # to receive into: a keeper has one thread, and copies what it got
_MOST_QUEUED = 64 << 20  # bytes; all objects and requests of a busy node are a tenth of that
_BATCH = 256  # packets taken at once: a worker that floods its keeper must not keep it from the kernel's requests
_SO_SNDBUFFORCE = 32  # socket(7): SO_SNDBUF without the limit of net.core.wmem_max
_SHORT_LIFE = 2.0  # a worker that dies younger than this, and never said a word, counts as a crash loop
_LONGEST_BACKOFF = 5.0


class Worker:
    """A worker process and our end of its socket. Sending never blocks: what does not fit waits in a queue."""

    def __init__(self, config: KeeperConfig, control_fd: int, nursery: Nursery | None = None) -> None:
        self.sock, self.process = _launch(config, control_fd, nursery)
        self.started = time.monotonic()
        self.last_heard = self.started
        self.listens = False  # it has said something: its signal handlers are there
        self.awaits_room = False  # who looks after the socket waits for room in it
        self._pinged = 0.0  # when the PING was sent that is not answered
        self._queue: deque[tuple[bytes, list[int], int | None]] = deque()
        self._queued = 0

    @property
    def backlog(self) -> bool:
        return bool(self._queue)

    def send(self, packet: bytes, fd: int | None = None, given: int | None = None) -> None:
        """Send, or queue, a packet. A worker that is gone is noticed where its socket is read.

        `given` is a second descriptor, which is closed once it was sent.
        """
        if fd is None and given is None and not self._queue and self._send_now(packet):
            return
        self._queue.append((packet, [each for each in (fd, given) if each is not None], given))
        self._queued += len(packet)
        if len(self._queue) == 1:
            self.flush()
        if self._queued > _MOST_QUEUED:
            log.error("the worker asks for much and reads nothing: killed")
            self._clear()
            self.signal(signal.SIGKILL)

    def _send_now(self, packet: bytes) -> bool:
        """What most packets need: no descriptors, and room for it."""
        try:
            return self.sock.send(packet) == len(packet)
        except OSError:
            return False

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        try:
            while self._queue:
                packet, fds, given = self._queue[0]
                send_with_fds(self.sock, packet, fds)
                self._queue.popleft()
                self._queued -= len(packet)
                if given is not None:
                    os.close(given)
        except BlockingIOError:
            pass
        except ConnectionError:
            self._clear()
        except OSError as error:  # without what was for it, its readers would wait for their deadline
            log.error("the worker cannot be sent to: %s: killed", error)
            self._clear()
            if self.sock.fileno() >= 0:  # else it was finished before
                self.signal(signal.SIGKILL)

    def _clear(self) -> None:
        for _, _, given in self._queue:
            if given is not None:
                os.close(given)
        self._queue.clear()
        self._queued = 0

    def receive(self) -> Iterator[bytes]:
        """Some of the packets that wait; EOFError behind the last packet of a worker that is gone.

        A worker has no descriptors to give: the kernel closes those that are sent to who does not ask for them.
        """
        for _ in range(_BATCH):
            try:
                size = self.sock.recv_into(_packet)
            except BlockingIOError:
                return
            except OSError:
                raise EOFError from None
            if not size:
                raise EOFError
            packet = bytes(_packet[:size])
            self.last_heard = time.monotonic()
            self.listens, self._pinged = True, 0.0
            yield packet

    def ping(self, now: float) -> float:
        """Ask for a sign of life, unless it was asked already; the seconds since then."""
        if not self._pinged:
            self._pinged = now
            self.send(pack_json(Kind.PING, {}))
        return now - self._pinged

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def finish(self) -> int | None:
        """Close the socket, end the process and reap it: its exit status, negative for a signal; None: unknown."""
        self.sock.close()
        self._clear()
        self.signal(signal.SIGKILL)
        return self.process.wait()


def _launch(config: KeeperConfig, control_fd: int, nursery: Nursery | None) -> tuple[socket.socket, Process]:
    """A new worker: our end of its socket, and the process. OSError: it cannot be started.

    A nursery that fails may have forked one all the same. That one must not share a socket with the one that is
    started in its place, or each would get half of the packets: its own closes here, and so it ends.
    """
    if nursery is not None:
        ours, theirs = _socketpair()
        with theirs:
            if forked := nursery.fork(theirs):
                return ours, forked
        ours.close()
    ours, theirs = _socketpair()
    try:
        with theirs:
            return ours, _start(config, control_fd, theirs.fileno())
    except OSError:
        ours.close()
        raise


def _start(config: KeeperConfig, control_fd: int, theirs: int) -> subprocess.Popen[bytes]:
    environment = worker_environment(config, control_fd) | {KEEPER_FD_ENV: str(theirs)}
    return subprocess.Popen(config.worker, env=environment, pass_fds=(theirs, control_fd), stdin=subprocess.DEVNULL)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    """Our end, which never blocks, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        _enlarge(end)
    ours.setblocking(False)
    return ours, theirs


def _enlarge(end: socket.socket) -> None:
    """Room for many packets: all that the system's limit allows where the privilege to pass it is missing."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)


class Backoff:
    """How long to wait before the next process is started: not at all, unless they die young one after the other."""

    def __init__(self) -> None:
        self._wait = 0.0

    def after(self, worker: Worker) -> float:
        """Seconds to wait, after this worker has died."""
        return self.wait(worker.last_heard <= worker.started and time.monotonic() - worker.started < _SHORT_LIFE)

    def wait(self, died_young: bool) -> float:
        """Seconds to wait, after a process has died."""
        self._wait = min(max(0.02, self._wait * 1.5), _LONGEST_BACKOFF) if died_young else 0.0
        return self._wait
