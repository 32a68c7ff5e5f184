"""Processes that are stopped, not dead: SIGSTOP to the worker, the keeper and the supervisor; and the log signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from tests.support.keeper_rig import Daemon, Image, make_image, results, start_reader, wait_until

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
