"""The keeper: one loop that carries requests from the kernel to a worker and answers back, each answer exactly once.

It does nothing that can fail for reasons outside this machine. The worker does, and may die: its unanswered requests
go to the next one. What the keeper itself cannot lose lives in the supervisor's descriptor store, in the journal and in
ROOT/keeper.json (and keeper.added).
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from loader.keeper import handover
from loader.keeper.calls import Calls
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import FdStore
from loader.keeper.host import find_host
from loader.keeper.leaving import Leaving
from loader.keeper.mounting import Background, Mounter
from loader.keeper.notes import HELD, Notes
from loader.keeper.nursery import Nursery
from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.protocol import Answer, Kind, Request, pack_json, pack_request, unpack, unpack_answer
from loader.keeper.requests import Pending, Present, Repeats, RequestTable
from loader.keeper.state import State
from loader.keeper.workers import Backoff, Worker

log = logging.getLogger(__name__)
CONTROL = "control"
LOCK = "lock"
_TICK = 1.0
_STANDBY_DELAY = 0.5  # let a worker that was just promoted have the processor first
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Keeper:
    """See the module. `fds` are the descriptors that were handed down, by name."""

    def __init__(self, config: KeeperConfig, fds: dict[str, int], store: FdStore) -> None:
        self.config, self.store = config, store
        self.control, self.lock = fds.pop(CONTROL), fds.pop(LOCK, None)
        self.host = find_host(fds)
        self.state = State.load(config.root)
        self.state.generation += 1
        self.requests = RequestTable()
        self.plane = self._make_plane(fds)
        for name, fd in fds.items():  # of objects that were not recorded any more, or not yet
            self.store.remove(name)
            os.close(fd)
        self.background = Background(self.host)
        self.mounter = Mounter(self.state, self.background, self.host, self.plane.name)
        self.mounter.refresh()
        self.mounter.resume_readahead()
        self.state.save()
        self.calls = Calls(self)
        self.worker: Worker | None = None
        self.standby: Worker | None = None
        self.worker_deaths = 0
        self.leaving: Leaving | None = None
        self._notes = Notes()
        self._backoff = Backoff()
        self._start_at = self._standby_at = self._tick_at = 0.0
        self._selector = selectors.EpollSelector()
        self.nursery = Nursery(config, self.control, self._selector)
        self._register(self.plane.fileno(), self._on_kernel)
        self._register(self.background.wake, self.background.finish)
        self._watch_signals()

    def _make_plane(self, fds: dict[str, int]) -> FanotifyPlane | CachefilesPlane:
        if self.config.plane == "cachefiles":
            return CachefilesPlane(self.config, self.store, self.state, self.requests, fds)
        return FanotifyPlane(self.store, self.state, self.requests, fds)

    def run(self) -> int:
        """Serve until told to leave; the exit status."""
        while True:
            self._tend_workers()
            if self.leaving is not None and self.leaving.done:
                return 0
            events = self._selector.select(HELD if self._notes.waits else _TICK)
            for key, _ in events:
                key.data()
            if not events:
                self._send_all_notes()
            self._tick()

    def watch_supervisor(self, pidfd: int, orphaned: Callable[[], None]) -> None:
        """Call `orphaned` when the process of `pidfd` ends, unless this keeper is leaving anyway."""

        def ended() -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            if self.leaving is None:
                orphaned()

        self._register(pidfd, ended)

    # The kernel

    def _on_kernel(self) -> None:
        epoll = self._selector.fileno() if self.leaving is None and not self._notes.held else -1
        for found in self.plane.read(self._listening(), epoll):
            if isinstance(found, Present):
                for packet in self._notes.add(found):
                    self._send(packet)
            elif isinstance(found, Repeats):
                self._send_notes()
                self._notes.repeat(found)
            elif not isinstance(found, Pending):
                self._send(pack_json(Kind.CLOSED, {"object": found.id}))
            elif self.leaving is not None and self.leaving.refuses:
                self.requests.take(found.id)
                self.plane.answer_by_presence(found)
            elif not found.sent:
                self._dispatch(found)

    def _listening(self) -> int:
        """The socket of the worker if it can be asked at once, for nothing is to be told before; else -1."""
        refuses = self.leaving is not None and self.leaving.refuses
        if self.worker is None or self.worker.backlog or self._notes.held or refuses:
            return -1
        return self.worker.sock.fileno()

    def _dispatch(self, pending: Pending) -> None:
        """Send a request to the worker. Without one it waits in the table: every new worker gets all of it."""
        if self.worker is None:
            return
        self._send_notes()
        if not pending.opening:
            request = Request(pending.id, pending.object, pending.offset, pending.length)
            self.worker.send(pack_request(request))
            return
        item = self.state.objects[pending.object]
        body = {"id": pending.id, "object": item.id, "volume": item.volume, "cookie": item.cookie}
        self.worker.send(pack_json(Kind.OPEN, body), self.plane.writers[item.id])

    def _send_notes(self) -> None:
        for packet in self._notes.take():
            self._send(packet)

    def _send_all_notes(self) -> None:
        for packet in self._notes.take_all():
            self._send(packet)

    def fail_all(self) -> None:
        """Answer everything that waits with an error."""
        for pending in self.requests.take_all():
            self.plane.answer(pending, errno.EIO)

    def fail_openings(self) -> None:
        """Answer the OPENs that wait with an error: the mounts behind them fail."""
        for pending in self.requests:
            if pending.opening and self.requests.take(pending.id):
                self.plane.answer(pending, errno.EIO)

    # The worker

    def _on_worker(self, worker: Worker) -> None:
        if worker not in (self.worker, self.standby):  # dropped in this very round
            return
        try:
            for packet in worker.receive():
                self._on_packet(worker, packet)
        except EOFError:
            self._worker_gone(worker)

    def _on_packet(self, worker: Worker, packet: bytes) -> None:
        if (answer := unpack_answer(packet)) is not None:
            self._answer(answer)
            return
        try:
            kind, body = unpack(packet)
        except ValueError as error:
            log.error("worker: %s", error)
            return
        if kind is Kind.OPENED and isinstance(body, dict):
            self._opened(body)
        elif kind is Kind.PONG:
            pass  # it was heard, that is all
        elif kind is Kind.CALL and isinstance(body, dict):
            self.calls.handle(body, self._replier(worker, body.get("token")))
        else:
            log.error("worker: unexpected %s", kind.name)

    def _answer(self, answer: Answer) -> None:
        pending = self.requests.take(answer.id)
        if pending is not None:
            if not answer.errno:
                self.requests.served()
            self.plane.answer(pending, answer.errno)

    def _opened(self, body: dict[str, Any]) -> None:
        number, size = body.get("id"), body.get("size")
        if not isinstance(number, int) or not isinstance(size, int) or size >= 1 << 63:
            log.error("worker: malformed OPENED")
            return
        pending = self.requests.take(number)
        if pending is not None and isinstance(self.plane, CachefilesPlane):
            opened = self.plane.opened(pending, size)
            if not opened:
                self._send(pack_json(Kind.CLOSED, {"object": pending.object}))

    def _replier(self, worker: Worker, token: Any) -> Callable[[dict[str, Any], int | None], None]:
        """What sends the RESULT of a call, if the worker that asked is still the one that serves."""
        token = token if isinstance(token, int) else 0

        def reply(body: dict[str, Any], fd: int | None = None) -> None:
            own = fd if "object" in body else None  # an object's stays here too; any other is the worker's alone
            given = fd if own is None else self.lend(body["object"])
            if worker is self.worker:
                worker.send(pack_json(Kind.RESULT, {"token": token, "errno": 0} | body), own, given)
                self._update_interest(worker)
            elif given is not None:
                os.close(given)

        return reply

    def _worker_gone(self, worker: Worker) -> None:
        self._selector.unregister(worker.sock)
        status = worker.finish()
        ended = "ended" if status is None else f"ended with status {status}"
        now = time.monotonic()
        wait = self._backoff.after(worker)
        if worker is self.standby:
            self.standby = None
            self._standby_at = now + max(wait, _STANDBY_DELAY)
            log.error("the standby worker %s", ended)
            return
        self.worker = None
        self._notes = Notes()  # for that one
        self.worker_deaths += 1
        self._start_at = now if self.standby is not None else now + wait
        if self.leaving is None:
            log.error("the worker %s; %d requests go to the next", ended, len(self.requests))

    def _tend_workers(self) -> None:
        """Have a worker, and one that waits."""
        now = time.monotonic()
        if self.leaving is not None:
            self.leaving.step()
        else:
            self.nursery.tend()
            self._have_workers(now)
        for worker in (self.worker, self.standby):
            if worker is not None:
                self._update_interest(worker)

    def _have_workers(self, now: float) -> None:
        can_start = not self.nursery.loading  # else there will be one at less cost in a moment
        if self.worker is None and now >= self._start_at and (self.standby or can_start):
            worker = self.standby or self._start_worker()
            if worker is not None:
                self._promote(worker)
                self.standby = None
                self._standby_at = now + _STANDBY_DELAY
        elif self.config.standby and self.worker and self.standby is None and now >= self._standby_at and can_start:
            self.standby = self._start_worker()

    def _start_worker(self) -> Worker | None:
        """None, and a pause until the next try, where the machine has no room for one more process."""
        try:
            worker = Worker(self.config, self.control, self.nursery)
        except OSError as error:
            self._start_at = self._standby_at = time.monotonic() + self._backoff.wait(died_young=True)
            log.error("a worker cannot be started: %s", error)
            return None
        self._register(worker.sock, lambda: self._on_writable_or_readable(worker))
        return worker

    def _on_writable_or_readable(self, worker: Worker) -> None:
        worker.flush()
        self._on_worker(worker)

    def _promote(self, worker: Worker) -> None:
        """Make a worker the one that serves: all objects, READY, and everything that waits."""
        self.worker = worker
        worker.started = worker.last_heard = time.monotonic()
        opening = {pending.object for pending in self.requests if pending.opening}
        for item in self.state.objects.values():
            if item.plane == self.plane.name and item.id not in opening and not item.released:
                worker.send(pack_json(Kind.OBJECT, item.to_wire()), self.plane.writers[item.id], self.lend(item.id))
        for part in self.calls.held():
            worker.send(pack_json(Kind.HELD, part))
        worker.send(pack_json(Kind.READY, self.calls.ready()))
        for pending in self.requests:
            self._dispatch(pending)
        self.store.notify(f"READY=1\nSTATUS=worker {worker.process.pid} serves")

    def lend(self, object_id: int) -> int | None:
        """A bitmap's descriptor for the worker that serves, where the plane has such."""
        return self.plane.lend(object_id) if isinstance(self.plane, FanotifyPlane) else None

    def drop_standby(self) -> None:
        if self.standby is not None:
            self._selector.unregister(self.standby.sock)
            self.standby.finish()
            self.standby = None

    def _send(self, packet: bytes) -> None:
        if self.worker is not None:
            self.worker.send(packet)

    # The loop

    def _register(self, source: int | socket.socket, call: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, call)

    def _update_interest(self, worker: Worker) -> None:
        """Wait for room in a worker's socket while something is queued for it."""
        if worker.awaits_room != worker.backlog:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.backlog else 0)
            self._selector.modify(worker.sock, events, self._selector.get_key(worker.sock).data)
            worker.awaits_room = worker.backlog

    def _tick(self) -> None:
        """What is due now and then, however busy the loop is."""
        now = time.monotonic()
        if now < self._tick_at:
            return
        self._tick_at = now + _TICK
        for pending in self.requests.take_overdue(self.config.deadline):
            log.error("deadline: %s", pending.describe())
            self.plane.answer(pending, errno.EIO)
        self._watch_worker(now)
        self._send_all_notes()
        if isinstance(self.plane, FanotifyPlane):
            self.plane.drop_unlinked()
        if self.state.unsaved:
            self.state.save()
        self.store.beat()

    def _watch_worker(self, now: float) -> None:
        """A worker that is stopped or hangs keeps its readers waiting: it is killed, and the next one gets them."""
        if self.worker is None:
            return
        patience = self.config.silence if self.worker.listens else self.config.start_silence
        if (silent := self.worker.ping(now)) > patience:
            log.error("the worker said nothing for %.0f s: killed", silent)
            self.worker.signal(signal.SIGKILL)

    def _watch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the supervisor starts us with them blocked
        self._register(ours, self._on_signals)
        self._signals = (ours, theirs)

    @property
    def signals(self) -> socket.socket:
        """Where the numbers of caught signals can be read."""
        return self._signals[0]

    def _on_signals(self) -> None:
        for number in self.signals.recv(64):
            self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.leave(self.config.on_stop)
        elif number == signal.SIGHUP and self.worker is not None:
            self.store.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self.drop_standby()  # it has the old configuration and code, and so has the nursery
            self.nursery.close()
            self.worker.signal(signal.SIGTERM)
        elif number == signal.SIGUSR1:
            log.warning("%d requests in flight", len(self.requests))
            for pending in self.requests:
                log.warning("in flight: %s", pending.describe())
            self._tell_worker(number)
        elif number == signal.SIGUSR2:
            for thread, frame in sys._current_frames().items():
                log.warning("thread %d:\n%s", thread, "".join(traceback.format_stack(frame)))
            self._tell_worker(number)

    def _tell_worker(self, number: int) -> None:
        if self.worker is not None and self.worker.listens:
            self.worker.signal(number)

    def leave(self, mode: str) -> None:
        """Begin to leave: mode keep (mounts stay) or umount."""
        if self.leaving is None:
            self.store.notify("STOPPING=1")
            self.leaving = Leaving(self, mode)

    def park(self) -> None:
        """Stay without worker and control socket, until the next daemon takes over."""
        handover.park(self)
