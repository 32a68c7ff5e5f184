"""Processes that are stopped, not dead: SIGSTOP to the worker, the keeper and the supervisor; and the log signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from tests.support import daemon as real
from tests.support.faulty_registry import FaultyRegistry
from tests.support.keeper_rig import WORKER, Daemon, Image, make_image, results, start_reader, wait_until
from tests.support.registry import docker_registry

pytestmark = pytest.mark.root


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", Form.ENCODED)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, silence=2.0)
    made.start()
    yield made
    made.close()


def test_a_stopped_worker_is_replaced(daemon: Daemon, image: Image, tmp_path: Path) -> None:
    daemon.mount(image, tmp_path / "mnt")
    _, worker = daemon.pids()
    os.kill(worker, signal.SIGSTOP)
    assert results(start_reader(tmp_path / "mnt")) == image.files
    status = daemon.call("status")
    assert status["counters"]["worker_deaths"] == 1
    assert status["counters"]["denied"] == 0
    assert "the worker said nothing" in daemon.log.read_text()


def test_a_worker_that_starts_slowly_is_not_taken_for_silent(image: Image, tmp_path: Path) -> None:
    """Killed for it, each next one would be as slow, and none would ever serve."""
    slowly = (
        sys.executable,
        "-c",
        "import runpy, sys, time; time.sleep(4); runpy.run_path(sys.argv[1], run_name='__main__')",
    )
    daemon = Daemon(tmp_path, silence=1.0, standby=False, worker=(*slowly, WORKER[1]))
    try:
        daemon.start()
        daemon.mount(image, tmp_path / "mnt")
        assert results(start_reader(tmp_path / "mnt")) == image.files
        assert daemon.call("status")["counters"]["worker_deaths"] == 0
    finally:
        daemon.close()


@pytest.mark.slow
def test_a_stopped_keeper_is_replaced(daemon: Daemon, image: Image, tmp_path: Path) -> None:
    daemon.mount(image, tmp_path / "mnt")
    keeper, _ = daemon.pids()
    os.kill(keeper, signal.SIGSTOP)
    found = results(start_reader(tmp_path / "mnt"))
    assert all(value == image.files[name] or value == "errno 5" for name, value in found.items())
    assert daemon.call("status")["generation"] == 2
    assert results(start_reader(tmp_path / "mnt")) == image.files


def test_a_stopped_supervisor_is_not_missed(daemon: Daemon, image: Image, tmp_path: Path) -> None:
    """Its socket fills up, and the keeper goes on."""
    daemon.mount(image, tmp_path / "mnt")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            assert results(start_reader(tmp_path / "mnt")) == image.files
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert daemon.call("status")["generation"] == 1


def test_signals_log_requests_and_stacks(daemon: Daemon, image: Image, tmp_path: Path) -> None:
    daemon.mount(image, tmp_path / "mnt")
    (daemon.source / "silent").touch()
    reader = start_reader(tmp_path / "mnt")
    wait_until(lambda: daemon.call("status")["requests"])
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "in flight: {'object'" in daemon.log.read_text())
    assert "'age'" in daemon.log.read_text()
    daemon.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "in _on_signals" in daemon.log.read_text())
    wait_until(lambda: daemon.call("status")["requests"])
    (daemon.source / "silent").unlink()
    os.kill(daemon.pids()[1], signal.SIGKILL)
    assert results(reader) == image.files


def test_signals_reach_the_worker(tmp_path: Path) -> None:
    """The frames that are waited for, and the worker's stacks, are logged too; and it lives on."""
    digests = real.make_tree(tmp_path / "tree")
    with docker_registry(tmp_path / "registry") as address, FaultyRegistry(address) as proxy:
        real.convert(tmp_path / "tree", f"docker://{address}/sample:1")
        with real.Daemon(tmp_path / "d") as running:
            target = running.mount(f"docker://{proxy.address}/sample:1")
            proxy.off = True
            reader = real.start_reader(target, 1)
            wait_until(lambda: running.command("status")["waiting"])
            worker = running.worker()
            running.signal(signal.SIGUSR1)
            wait_until(lambda: "in flight: frame" in running.log.read_text())
            running.signal(signal.SIGUSR2)
            wait_until(lambda: "Current thread" in running.log.read_text())
            proxy.off = False
            assert real.result(reader) == digests
            assert running.worker() == worker


def test_a_worker_that_always_dies(tmp_path: Path, image: Image) -> None:
    """Readers get errors at the deadline, starts are spaced, and a worker that lives is welcome again."""
    daemon = Daemon(tmp_path, deadline=3.0)
    try:
        daemon.start()
        daemon.mount(image, tmp_path / "mnt")
        _, worker = daemon.pids()
        (daemon.source / "crash").touch()
        os.kill(worker, signal.SIGKILL)
        reader = start_reader(tmp_path / "mnt")
        assert reader.stdout is not None
        assert reader.stdout.readline().endswith("errno 5\n")
        reader.kill()
        reader.communicate()
        assert daemon.log.read_text().count("the worker ended") < 60
        (daemon.source / "crash").unlink()
        daemon.pids()  # there is one: a start may be later than this deadline
        assert results(start_reader(tmp_path / "mnt")) == image.files
    finally:
        daemon.close()
