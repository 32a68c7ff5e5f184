"""A machine without room for one more process or thread: what fails is tried again, and keeper and requests live on."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from erofs_builder.payload import Form
from loader.keeper import __main__ as process
from loader.keeper import handover
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import FdStore
from loader.keeper.host import Host
from loader.keeper.keeper import CONTROL, Keeper
from loader.keeper.state import MountRecord
from loader.keeper.twin import fork_twin
from tests.support.keeper_rig import Daemon, daemon_pids, make_image, results, start_reader, wait_until

PIDS = Path("/sys/fs/cgroup/pids")
Fail = Callable[[int], None]


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """In this process, with a group that nothing comes from."""
    monkeypatch.setattr("fanotify.init", lambda: os.eventfd(0, os.EFD_NONBLOCK))
    monkeypatch.setattr("fanotify.mark_fd", lambda group, fd: None)
    monkeypatch.setattr(Keeper, "_watch_signals", lambda self: None)
    config = KeeperConfig(root=tmp_path, worker=("sleep", "600"), nursery=("sleep", "600"), standby=False)
    made = Keeper(config, {CONTROL: os.dup(0)}, FdStore(None))
    yield made
    made.nursery.close()
    if made.worker is not None:
        made.worker.finish()
    os.close(made.control)


@pytest.fixture
def fail_threads(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Have the next so many threads fail."""
    real = threading.Thread.start
    left = 0

    def start(thread: threading.Thread) -> None:
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("can't start new thread")
        real(thread)

    def fail(count: int) -> None:
        nonlocal left
        left = count

    monkeypatch.setattr(threading.Thread, "start", start)
    return fail


def test_processes_are_tried_again(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    failed: list[Any] = []

    def start(command: Any, **options: Any) -> Any:
        if len(failed) < 4:  # the nursery once, and workers
            failed.append(command)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    while len(failed) < 4:
        keeper._tend_workers()
        assert keeper.worker is None
        time.sleep(0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    until = time.monotonic() + 20
    while keeper.worker is None:
        assert time.monotonic() < until
        keeper._tend_workers()
        time.sleep(0.01)
    assert keeper._standby_at


def test_a_mount_without_a_thread(keeper: Keeper, fail_threads: Fail, tmp_path: Path) -> None:
    found: list[OSError | None] = []
    fail_threads(2)
    keeper.mounter.mount({"target": str(tmp_path), "objects": []}, found.append)
    keeper.mounter.umount({"target": str(tmp_path)}, found.append)
    keeper.background.finish()
    assert [failure and failure.errno for failure in found] == [errno.EAGAIN, errno.EAGAIN]
    assert not keeper.state.mounts and not keeper.mounter._under_way and not keeper.background.running


def test_a_look_at_the_mounts_without_a_thread(
    keeper: Keeper, fail_threads: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "enter", lambda self: None)
    keeper.host.namespace = 0
    keeper.state.mounts["/nowhere"] = MountRecord("/nowhere", "fanotify", "none")
    fail_threads(1)
    keeper.mounter.refresh()
    assert keeper.state.mounts
    fail_threads(1)
    assert not handover._may_go(keeper)
    keeper.mounter.refresh()
    assert not keeper.state.mounts


def test_a_fence_is_tried_again(keeper: Keeper, fail_threads: Fail, tmp_path: Path) -> None:
    """Who leaves must not leave holes behind that are read as zeros."""
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    item = keeper.state.new_object("fanotify", path=str(path), form="decoded", size=4096, mounted=True)
    keeper.state.mounts[str(tmp_path)] = MountRecord(str(tmp_path), "fanotify", "none", objects=[item.id])
    keeper.leave("umount")
    assert keeper.leaving is not None
    fail_threads(2)
    until = time.monotonic() + 20
    unmounted = False
    while not keeper.leaving.done:
        assert time.monotonic() < until
        keeper._tend_workers()
        keeper.background.finish()
        if not unmounted and not keeper.state.mounts:
            unmounted = True
            fail_threads(2)
        time.sleep(0.01)
    assert unmounted and not path.exists()


@pytest.mark.parametrize("failures", [2, 1000])
def test_who_cannot_become_the_supervisor(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """It tries again, and then parks: it is the last that holds."""
    tried: list[str] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        tried.append("exec")
        if len(tried) <= failures:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        raise SystemExit

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(process, "_PAUSE", 0.0)
    monkeypatch.setattr(process, "_hold_signals", lambda keeper: None)
    monkeypatch.delenv("EROFS_LOADER_STORED", raising=False)
    nothing = SimpleNamespace(handed_down=dict, close=lambda: None)
    control = socket.socket()
    keeper = SimpleNamespace(
        drop_standby=lambda: None, worker=None, nursery=nothing, plane=nothing, host=nothing, lock=None,
        control=control.fileno(), park=lambda: tried.append("park"),
    )  # fmt: skip
    with control, pytest.raises(SystemExit):
        process.orphaned(cast(Keeper, keeper))
    assert tried == ["exec"] * 3 if failures == 2 else tried == ["exec"] * process._EXECS + ["park"]


@pytest.mark.parametrize("call", ["fork", "pidfd_open"])
def test_a_twin_that_cannot_be_forked(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    gc.collect()  # what tests before this one have left open ends now, and not below
    before = len(list(Path("/proc/self/fd").iterdir()))

    def fail(*_: object) -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, call, fail)
    twin = fork_twin(lambda: None)
    assert twin is not None and not twin
    twin.reap()
    twin.kill()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup that limits processes."""
    made = PIDS / f"erofs-{os.getpid()}"
    made.mkdir()
    yield made
    wait_until(lambda: not (made / "cgroup.procs").read_text())
    made.rmdir()


@pytest.mark.root
@pytest.mark.skipif(not PIDS.is_dir(), reason="there is no cgroup to limit processes")
def test_a_parked_keeper_without_room_for_its_twin(tmp_path: Path, group: Path) -> None:
    """It holds alone, answers when it has to, and forks a twin as soon as it can."""
    image = make_image(tmp_path / "image", Form.DECODED)
    daemon = Daemon(tmp_path, standby=False, grace=3.0)
    try:
        daemon.start()
        daemon.mount(image, tmp_path / "mnt")
        (group / "cgroup.procs").write_text(str(daemon.pids()[0]))
        (group / "pids.max").write_text("1")
        assert daemon.stop() == 0
        assert set(results(start_reader(tmp_path / "mnt")).values()) == {f"errno {errno.EIO}"}
        assert len(daemon_pids(daemon.root)) == 1
        (group / "pids.max").write_text("max")
        wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
        daemon.start()
        assert daemon.call("status")["fenced"] == []
        assert results(start_reader(tmp_path / "mnt")) == image.files
    finally:
        daemon.close()


@pytest.mark.root
@pytest.mark.skipif(not PIDS.is_dir(), reason="there is no cgroup to limit processes")
def test_a_limit_of_processes(tmp_path: Path, group: Path) -> None:
    """The worker is killed and none can be started: readers wait, and get right bytes when there is room again."""
    image = make_image(tmp_path / "image", Form.DECODED)
    daemon = Daemon(tmp_path, standby=False)
    try:
        daemon.start()
        daemon.mount(image, tmp_path / "mnt")
        keeper, worker = daemon.pids()
        (group / "cgroup.procs").write_text(str(keeper))
        (group / "pids.max").write_text("1")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: "a worker cannot be started" in daemon.log.read_text())
        reader = start_reader(tmp_path / "mnt")
        time.sleep(1)
        assert reader.poll() is None
        (group / "pids.max").write_text("max")
        assert results(reader) == image.files
        assert daemon.pids()[0] == keeper
        counters = daemon.call("status")["counters"]
        assert counters["denied"] == 0
    finally:
        daemon.close()
