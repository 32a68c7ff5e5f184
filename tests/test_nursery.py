"""The nursery: workers are forked by it, outlive it, and are started without it where it does not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.keeper_rig import wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "d") as running:
        yield running


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_nursery(pid: int) -> bool:
    return b"loader.worker.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()


def replace_worker(daemon: Daemon) -> int:
    """Kill whoever serves; the pid of who serves then."""
    worker = daemon.worker()
    os.kill(worker, signal.SIGKILL)
    return daemon.worker()


def test_workers_come_from_the_nursery(daemon: Daemon) -> None:
    keeper = daemon.command("status")["keeper"]["pid"]
    nursery = parent(daemon.worker())
    assert is_nursery(nursery) and parent(nursery) == keeper
    assert parent(replace_worker(daemon)) == nursery
    wait_until(lambda: "the worker ended with status -9" in daemon.log.read_text())
    assert Path(f"/proc/{daemon.worker()}/comm").read_text() == "erofs-worker\n"


def test_a_killed_nursery_takes_no_worker_with_it(daemon: Daemon) -> None:
    """And its workers, which the next one cannot reap, take nothing with them when they end."""
    worker, keeper = daemon.worker(), daemon.command("status")["keeper"]["pid"]
    nursery = parent(worker)
    os.kill(nursery, signal.SIGKILL)
    wait_until(lambda: "the nursery: ended" in daemon.log.read_text())
    assert daemon.worker() == worker
    wait_until(lambda: [pid for pid in children(keeper) if is_nursery(pid)])
    second = next(pid for pid in children(keeper) if is_nursery(pid))
    wait_until(lambda: "_ssl" in Path(f"/proc/{second}/maps").read_text())  # nearly all is loaded
    while parent(daemon.worker()) != second:
        replace_worker(daemon)
    replace_worker(daemon)
    assert parent(daemon.worker()) == second
    assert daemon.log.read_text().count("the nursery: ended") == 1


def test_a_stopped_nursery_is_done_without(daemon: Daemon) -> None:
    nursery = parent(daemon.worker())
    wait_until(lambda: len(children(nursery)) == 2)
    os.kill(nursery, signal.SIGSTOP)
    replace_worker(daemon)
    replace_worker(daemon)
    assert "the nursery: timed out" in daemon.log.read_text()
    assert not Path(f"/proc/{nursery}").exists()


def test_an_upgrade_loads_everything_anew(daemon: Daemon) -> None:
    worker = daemon.worker()
    nursery = parent(worker)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: daemon.worker() != worker)
    assert parent(daemon.worker()) != nursery
    assert not Path(f"/proc/{nursery}").exists()
