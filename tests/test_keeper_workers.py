"""A worker that has gone mad: the keeper neither drowns in its packets nor piles answers up for it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from loader.keeper import workers
from loader.keeper.config import KeeperConfig
from loader.keeper.nursery import Nursery
from loader.keeper.workers import Backoff, Worker

Start = Callable[[str], Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Worker] = []
    control = os.open("/dev/null", os.O_RDONLY)

    def start(program: str) -> Worker:
        prelude = "import os, socket, time; sock = socket.socket(fileno=int(os.environ['EROFS_LOADER_KEEPER_FD']))\n"
        config = KeeperConfig(tmp_path, tmp_path / "s", "fanotify", worker=(sys.executable, "-c", prelude + program))
        started.append(Worker(config, control))
        return started[-1]

    yield start
    for worker in started:
        worker.finish()
    os.close(control)


def test_who_was_forked_by_a_nursery_that_died_of_it_shares_no_socket(tmp_path: Path) -> None:
    """Each would get half of the packets: one the objects, the other their READs, which it would answer with errors."""

    class Dying:
        kept: socket.socket

        def fork(self, theirs: socket.socket) -> None:
            self.kept = theirs.dup()  # the worker that it forked before it died

    nursery = Dying()
    config = KeeperConfig(tmp_path, tmp_path / "s", "fanotify", worker=("sleep", "600"))
    with open("/dev/null", "rb") as control:
        worker = Worker(config, control.fileno(), cast(Nursery, nursery))
    try:
        worker.send(b"packet")
        with nursery.kept:
            assert nursery.kept.recv(100) == b""
    finally:
        worker.finish()


def test_a_flood_is_taken_in_portions(start: Start) -> None:
    worker = start("while True: sock.send(b'x')")
    while not (first := list(worker.receive())):
        pass
    for _ in range(20):
        assert len(list(worker.receive())) <= workers._BATCH
    assert len(first) <= workers._BATCH


def test_who_never_reads_is_killed(start: Start) -> None:
    worker = start("time.sleep(600)")
    packet = bytes(200_000)
    for _ in range(workers._MOST_QUEUED // len(packet) + 20):
        worker.send(packet)
    assert worker.process.wait() == -9
    assert sum(len(data) for data, *_ in worker._queue) < workers._MOST_QUEUED // 2


def test_who_reads_late_gets_everything(start: Start) -> None:
    worker = start("time.sleep(0.5)\nfor _ in range(100): sock.recv(1 << 20)\nsock.send(b'done')\ntime.sleep(600)")
    for _ in range(100):
        worker.send(bytes(200_000))
    assert worker.backlog
    while not (packets := list(worker.receive())):
        worker.flush()
    assert packets == [b"done"] and not worker.backlog
    assert worker._queued == 0


def test_who_cannot_be_sent_to_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one gets everything. To one that is gone already nothing is done."""
    monkeypatch.setattr(workers, "send_with_fds", lambda *_: os.write(-1, b""))
    worker = start("time.sleep(600)")
    worker.send(b"packet", 0)
    assert worker.process.wait() == -9 and not worker.backlog
    monkeypatch.undo()
    worker = start("sock.close()\ntime.sleep(1)\nos._exit(7)")
    while True:
        try:
            list(worker.receive())
        except EOFError:
            break
    worker.send(b"packet", 0)
    assert worker.process.wait() == 7 and not worker.backlog


def test_only_who_dies_young_again_and_again_is_waited_for() -> None:
    backoff = Backoff()
    waits = [backoff.wait(died_young=True) for _ in range(20)]
    assert waits[0] == 0.02 and waits == sorted(waits) and waits[-1] == workers._LONGEST_BACKOFF
    assert backoff.wait(died_young=False) == 0.0
    assert backoff.wait(died_young=True) == 0.02
