"""The worker as a whole: its parts put together, the packets of the keeper sent to them, and what runs by the clock."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from erofs_builder.errors import FormatError
from erofs_builder.payload import Form, Payload
from loader.cache.claims import LEAST_AHEAD, FlightTable
from loader.cache.layout import Layout
from loader.cache.records import open_state
from loader.config import Config
from loader.keeper.protocol import Kind, Request
from loader.registry.config import RegistryConfig
from loader.registry.open import Opener
from loader.worker.collector import Collector
from loader.worker.complaints import Complaints
from loader.worker.confinement import Confinement
from loader.worker.counters import Counters
from loader.worker.eviction import Culler, FrameEvictor
from loader.worker.fetcher import Fetcher
from loader.worker.hands import Hands
from loader.worker.hints import hints_of
from loader.worker.housekeeping import Housekeeper, checkpoint
from loader.worker.images import Images
from loader.worker.kernel_look import KernelLook
from loader.worker.link import Link, Packet
from loader.worker.link_estimate import LinkEstimate
from loader.worker.mounting import Mounting
from loader.worker.objects import Objects
from loader.worker.outages import Outages
from loader.worker.patrol import Patrol
from loader.worker.readahead import ReadAhead
from loader.worker.readpath import ReadPath
from loader.worker.scrub import Scrubber
from loader.worker.scrub_metadata import MetadataScrubber
from loader.worker.sharing import OFF, PageSharing
from loader.worker.sources import Sources
from loader.worker.starts import Starts

log = logging.getLogger(__name__)

# Bytes of one range request by priority, at most. Large where the link is fast: for some registries each costs much.
# Ahead of a reader, more is asked for once half of its window is read: half a window and a bit. A limit of just half a
# window would make a second request for the bit.
RANGE_LIMITS = (4 << 20, 16 << 20, 8 << 20)
EXPIRE_INTERVAL = 0.25  # seconds
LISTEN_INTERVAL = 5.0  # seconds for which READs of what was just read are not heard of


class Service:
    """Everything that a worker has. `plane` is what the keeper says that it serves."""

    def __init__(
        self, config: Config, registries: RegistryConfig, link: Link, plane: str, confinement: Confinement
    ) -> None:
        self.config = config
        self.confinement = confinement
        self.plane = plane
        self.started = time.time()
        self.layout = Layout(config.root)
        self.layout.prepare()
        self.state = open_state(self.layout)
        self.counters = Counters()
        self.link = link
        self.link_estimate = LinkEstimate()
        self._opener = Opener(registries)
        self.sources = Sources(self._opener.open)
        self.flights = FlightTable(
            config.connections, config.prefetch_connections, RANGE_LIMITS, lambda: self.link_estimate.ahead
        )
        self.readahead = ReadAhead(self.link_estimate, config.readahead, config.rest)
        self.starts = Starts(self.layout, self.flights, self.readahead)
        self.images = Images(
            self.layout, self.state, self.sources, self.counters, self.starts, one_table=plane == "cachefiles"
        )
        self.objects = Objects(self.layout, self.images.find_metadata, self.images.find_tag)
        self.executor = ThreadPoolExecutor(8, "work")
        self.pages = PageSharing(config.page_domain if plane == "fanotify" else OFF, self.layout.tmp)
        self.mounting = Mounting(
            plane, config.domain, self.layout, self.state, self.images, self.objects, self.flights, link,
            self._announce, self.starts, self.pages,
        )  # fmt: skip
        culler = Culler(self.layout, self.state, link) if plane == "cachefiles" else None
        self.collector = Collector(
            self.layout, self.state, self.objects, self.mounting, FrameEvictor(self.objects, self.flights, link),
            culler, self.counters, config.quota,
        )  # fmt: skip
        self.outages = Outages(config.deadline)
        self.housekeeper = Housekeeper(self.objects, self.collector, self.mounting, self.readahead, self.state, link)
        self.fetcher = Fetcher(
            self.flights, self.sources, self.counters, self.link_estimate, self.collector.make_room, self.outages,
            self.housekeeper.hurry,
        )  # fmt: skip
        self.readpath = ReadPath(
            self.objects, self.flights, self.readahead, self.counters, link.answer, self.executor, self.outages,
            self.fetcher.why, quiet=True,
        )  # fmt: skip
        look = KernelLook(self.layout, culler, self.objects, link) if culler is not None else None
        self.scrubber = Scrubber(
            self.layout, self.state, self.objects, self.mounting, self.flights, link, self.counters, look,
            MetadataScrubber(self.images.payloads, look),
        )  # fmt: skip
        self.patrol = Patrol(
            self.layout, lambda: self.scrubber.scrub(0.0), lambda: self.flights.idle, config.scrub_days
        )
        self.generation = 0
        self.fenced: list[Any] = []
        self._held: list[Any] = []  # the keeper's mounts, until READY
        self._stopped = threading.Event()

    def _announce(self, payload: Payload) -> None:
        if sum(table.blob_size for table in payload.tables) > LEAST_AHEAD:  # less comes at once, hint or not
            self.executor.submit(self._learn, payload)

    def _learn(self, payload: Payload) -> None:
        try:
            for table, hints in zip(payload.tables, hints_of(payload), strict=True):
                self.readahead.learn(table.blob_digest.raw, len(table), hints)
        except FormatError as error:
            log.warning("no hints for fetching ahead: %s", error)

    @property
    def form(self) -> Form:
        """The form of new mounts that do not name one."""
        return Form.ENCODED if self.config.form == "auto" else Form(self.config.form)

    def follow(self, kernel_log: int) -> None:
        """Heed what the kernel says about cached bytes."""
        Complaints(kernel_log, self.state, self.images, self.objects, self.scrubber.check).start()

    def serve(self, packets: Iterator[Packet]) -> None:
        """Handle the keeper's packets until it hangs up. Nothing in here waits for the network or a CALL."""
        self.executor.submit(importlib.import_module, "loader.registry.session")  # or the first mount waits for it
        threading.Thread(target=self._expire, name="expire", daemon=True).start()
        threading.Thread(target=self.housekeeper.run, args=(self._stopped,), name="housekeep", daemon=True).start()
        threading.Thread(target=self.patrol.run, args=(self._stopped,), name="patrol", daemon=True).start()
        threading.Thread(target=self.collector.run, args=(self._stopped,), name="quota", daemon=True).start()
        hands = Hands(self.flights, packets, self._packet, self.readpath.follow, self.fetcher.fetch)
        hands.work(self.config.connections)

    def _packet(self, packet: Packet) -> None:
        body: Any
        kind, body, fd = packet
        if kind is Kind.REQUEST and isinstance(body, Request):
            self.readpath.request(body)
        elif kind is Kind.PRESENT and isinstance(body, Request):
            self.readpath.seen(body)
        elif kind is Kind.REPEATS and isinstance(body, Request):
            self.readpath.repeated(body)
        elif kind is Kind.OBJECT and fd is not None:
            self.objects.add_from_keeper(body, fd)
        elif kind is Kind.OPEN and fd is not None:
            size = self.objects.add_cachefiles(int(body["object"]), str(body["volume"]), str(body["cookie"]), fd)
            self.link.opened(int(body["id"]), size)
        elif kind is Kind.CLOSED:
            self._closed(int(body["object"]))
        elif kind is Kind.HELD:
            self._held += body.get("mounts") or ()
            self.fenced += body.get("fenced") or ()
        elif kind is Kind.READY:
            self.generation = int(body.get("generation", 0))
            self.mounting.begin()
            self.collector.begin()
            self.executor.submit(self._recover, self._held)
        else:
            log.error("unexpected packet %s", kind.name)
            if fd is not None:
                os.close(fd)

    def _closed(self, number: int) -> None:
        item = self.objects.get(number)
        if item is None or item.file is None:
            self.objects.close(number)
            return
        file = item.file
        self.readahead.forget(file)
        checkpoint(file)
        self.objects.close(number)
        self.flights.forget(file)

    def _recover(self, held: list[Any]) -> None:
        try:
            self.mounting.adopt(held)
            self.mounting.recover(self.fenced)
        except Exception:
            log.exception("the mounts on record could not be checked")

    def _expire(self) -> None:
        listened = time.monotonic()
        while not self._stopped.wait(EXPIRE_INTERVAL):
            try:
                if expired := self.flights.expire():
                    self.counters.add("requests_expired", expired)
                self.collector.watch()
                if (now := time.monotonic()) >= listened + LISTEN_INTERVAL:
                    listened = now
                    for file in self.objects.files():
                        file.listen()
            except Exception:
                log.exception("looking after those who wait failed")

    def log_waiting(self) -> None:
        """Log what readers wait for, and since when."""
        waiting = sorted(self.flights.waiting(), key=lambda item: -item[2])
        log.warning("%d frames are waited for", len(waiting))
        for file, frame, age in waiting:
            log.warning("in flight: frame %d of %s, for %.3f s", frame, file, age)

    def stop(self) -> None:
        """Leave in order: sync what is ready. Requests that are not answered go to the next worker."""
        self._stopped.set()
        self.housekeeper.hurry()
        self.flights.stop()
        for file in self.objects.files():
            checkpoint(file)
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.sources.close()
        self._opener.close()
        self.state.close()
