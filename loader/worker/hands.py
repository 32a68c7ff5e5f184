"""The threads of a worker. One of them watches the keeper's socket, the others fetch or wait.

Whoever reads a request that needs a fetch fetches it himself, at once, and leaves the watch to one that waits, as soon
as the registry has been asked: between the request and its fetch no thread is waited for, or woken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial

from loader.cache.claims import WATCH, FlightTable, Run
from loader.worker.link import Packet

log = logging.getLogger(__name__)
# Seconds. A signal that comes just before the main thread begins to wait is heeded when it has waited.
LOOK = 1.0


class Hands:
    """`handle` gets each packet and waits for nothing; `follow` thinks ahead, when it is in nobody's way; `fetch` ends
    a run, and calls what it is given once that has been asked for."""

    def __init__(
        self,
        flights: FlightTable,
        packets: Iterator[Packet],
        handle: Callable[[Packet], None],
        follow: Callable[[], None],
        fetch: Callable[[Run, Callable[[], None]], None],
    ) -> None:
        self._flights = flights
        self._packets = packets
        self._handle = handle
        self._follow = follow
        self._fetch = fetch
        self._ended = threading.Event()

    def work(self, connections: int) -> None:
        """Start the threads, one more than may fetch; returns when the keeper has hung up."""
        for number in range(connections + 1):
            threading.Thread(target=self._work, name=f"hand-{number}", daemon=True).start()
        self._flights.unwatch()
        while not self._ended.wait(LOOK):
            pass

    def _work(self) -> None:
        while (task := self._flights.take_or_watch()) is not None:
            if task is WATCH:
                self._watch()
            elif isinstance(task, Run):
                self._fetch(task, _nothing)

    def _watch(self) -> None:
        """Handle packets until one of them gives us something to fetch."""
        try:
            self._try(self._follow)
            if self._fetched():
                return
            for packet in self._packets:
                self._try(partial(self._handle, packet))
                if self._fetched():
                    return
                self._try(self._follow)
                if self._fetched():
                    return
        except Exception:
            log.exception("the keeper's socket cannot be read any more")
        self._ended.set()

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # one bad packet must not end the serving of all others
            log.exception("a packet could not be handled")

    def _fetched(self) -> bool:
        """If there is something to fetch, and somebody to watch meanwhile: fetch it."""
        run = self._flights.take_now(least_idle=1)
        if run is None:
            return False
        self._fetch(run, self._flights.unwatch)
        return True


def _nothing() -> None:
    """What one does who did not watch: another one does."""
