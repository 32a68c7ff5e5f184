"""The worker's threads: who watches, who fetches."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from loader.cache.claims import FlightTable, Priority, Run
from loader.cache.files import CacheFile
from loader.keeper.protocol import Kind, Request
from loader.worker.hands import Hands
from loader.worker.link import Packet
from tests.support.cache_files import open_file, sample

CONNECTIONS = 3


class Rig:
    """Hands that get numbers of frames as packets; each fetch waits until it is let go."""

    def __init__(self, root: Path) -> None:
        self.file: CacheFile = open_file(root, sample(), Form.ENCODED)
        self.flights = FlightTable(CONNECTIONS, CONNECTIONS, (1, 1, 1))
        self.packets: queue.Queue[int | None] = queue.Queue()
        self.seen: queue.Queue[tuple[int, str]] = queue.Queue()
        self.fetching: queue.Queue[tuple[int, str]] = queue.Queue()
        self.followed = 0
        self.connecting = 0.0  # seconds until a request is out
        self.ahead: list[int] = []  # what each packet wants too, when there is time
        self.let_go = threading.Semaphore(0)
        self.hands = Hands(self.flights, self._packets(), self._handle, self._follow, self._fetch)
        self.thread = threading.Thread(target=self.hands.work, args=(CONNECTIONS,))
        self.thread.start()

    def _packets(self) -> Iterator[Packet]:
        while (number := self.packets.get()) is not None:
            yield Kind.REQUEST, Request(number, 1, 0, 1), None

    def _handle(self, packet: Packet) -> None:
        request = packet[1]
        assert isinstance(request, Request)
        self.seen.put((request.id, threading.current_thread().name))
        if request.id < 0:
            raise ValueError("a bad packet")
        self.flights.want(self.file, [request.id], Priority.DEMAND, quiet=True)
        self.flights.want(self.file, self.ahead, Priority.AHEAD, quiet=True)

    def _follow(self) -> None:
        self.followed += 1

    def _fetch(self, run: Run, sent: Callable[[], None]) -> None:
        time.sleep(self.connecting)
        sent()
        self.fetching.put((run.flights[0].frame, threading.current_thread().name))
        assert self.let_go.acquire(timeout=20)
        self.flights.land(run.flights[0])
        self.flights.finish(run)

    def await_seen(self, number: int) -> bool:
        while self.seen.get(timeout=20)[0] != number:
            pass
        return True

    def close(self) -> None:
        self.packets.put(None)
        self.let_go.release(100)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.flights.stop()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def test_who_reads_a_request_fetches_it_and_another_watches(rig: Rig) -> None:
    for frame in (1, 3, 5):
        rig.packets.put(frame)
        number, watcher = rig.seen.get(timeout=20)
        fetched, fetcher = rig.fetching.get(timeout=20)
        assert (number, fetched) == (frame, frame)
        assert watcher == fetcher
    assert rig.followed


def test_all_connections_busy_still_leaves_one_who_watches(rig: Rig) -> None:
    for frame in (1, 3, 5, 7):
        rig.packets.put(frame)
    assert sorted(rig.seen.get(timeout=20)[0] for _ in range(4)) == [1, 3, 5, 7]
    assert {rig.fetching.get(timeout=20)[0] for _ in range(CONNECTIONS)} == {1, 3, 5}
    assert rig.fetching.empty()
    rig.let_go.release()
    assert rig.fetching.get(timeout=20)[0] == 7


def test_a_bad_packet_ends_nothing(rig: Rig) -> None:
    rig.packets.put(-1)
    rig.packets.put(2)
    assert rig.fetching.get(timeout=20)[0] == 2


def test_what_others_want_is_fetched_too(rig: Rig) -> None:
    rig.flights.want(rig.file, [4], Priority.AHEAD)
    assert rig.fetching.get(timeout=20)[0] == 4


def test_the_last_free_hand_watches(rig: Rig) -> None:
    """Two things to fetch at once, and two hands: one fetches, the other sees to the keeper."""
    for frame in (1, 3):  # these hands are busy
        rig.packets.put(frame)
        rig.fetching.get(timeout=20)
    rig.ahead, rig.connecting = [7], 0.2
    rig.packets.put(5)
    assert rig.fetching.get(timeout=20)[0] == 5
    rig.packets.put(9)
    assert rig.await_seen(9)
    assert rig.fetching.empty()
    for _ in range(2):
        rig.let_go.release()
    assert {rig.fetching.get(timeout=20)[0] for _ in range(2)} == {7, 9}


def test_a_signal_that_does_not_end_a_wait_is_heeded(tmp_path: Path) -> None:
    """As one does that comes just before the wait, or, as here, to another thread."""
    flights = FlightTable(1, 1, (1, 1, 1))
    packets: queue.Queue[None] = queue.Queue()

    def signalled() -> None:
        time.sleep(0.5)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    hands = Hands(flights, iter(packets.get, None), lambda _: None, lambda: None, lambda *_: None)
    before = signal.signal(signal.SIGUSR1, lambda *_: packets.put(None))
    try:
        threading.Thread(target=signalled).start()
        hands.work(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
        flights.stop()
