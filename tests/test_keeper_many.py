"""A node with many cache files: the keeper's descriptors have numbers beyond what select(2) takes."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fanotify
from erofs_builder.payload import Form
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import FdStore
from loader.keeper.journal import Journal
from loader.keeper.nursery import Nursery, _Forked
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.readable import readable
from loader.keeper.requests import RequestTable
from loader.keeper.state import State
from tests.support.keeper_rig import Daemon, Image, daemon_pids, make_image, results, start_reader, wait_until

MANY = 1100


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Numbers below MANY are taken."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2 * MANY), limits[1]))
    opened = [os.open("/dev/null", os.O_RDONLY)]
    while opened[-1] < MANY:
        opened.append(os.dup(opened[0]))
    yield
    for fd in opened:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_readable(many_descriptors: None) -> None:
    (ours, theirs), (other, silent) = os.pipe(), os.pipe()
    assert ours > MANY
    assert readable([ours, other], 0.02) == set()
    os.write(theirs, b"x")
    os.close(silent)
    assert readable([ours, other]) == {ours, other}
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        readable([other], 0)
    os.close(ours)
    os.close(theirs)


def test_a_forked_workers_end(many_descriptors: None, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "0.1"])
    pidfd = os.pidfd_open(process.pid)
    assert pidfd > MANY
    started = time.monotonic()
    assert (
        _Forked(Nursery(KeeperConfig(root=tmp_path), -1, selectors.DefaultSelector()), process.pid, pidfd).wait()
        is None
    )
    assert time.monotonic() - started > 0.05
    process.wait()


READ = "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)"


@pytest.mark.root
def test_an_event_of_a_high_number_that_was_not_written_down(tmp_path: Path) -> None:
    """Whoever takes over denies it: the keeper that had read it had many objects, and no journaled event before."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, limits[1]))
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    state = State.load(tmp_path)
    with contextlib.ExitStack() as opened:
        for number in range(2000):
            state.new_object("fanotify", path=f"/nowhere/{number}", size=4096)
        for _ in range(3 * len(state.objects)):
            opened.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        group, journal, writer = fanotify.init(), Journal.create(), os.open(path, os.O_RDWR)
        opened.callback(os.close, writer)
        fanotify.mark_fd(group, writer)
        with subprocess.Popen([sys.executable, "-c", READ, str(path)], stderr=subprocess.PIPE) as reader:
            assert readable([group], 20)
            (event,) = fanotify.read_events(group)
            assert event.fd > 3 * len(state.objects)
            opened.callback(os.close, event.fd)
            plane = FanotifyPlane(FdStore(None), state, RequestTable(), {"group": group, "journal": journal.fd})
            try:
                _, errors = reader.communicate(timeout=20)
                assert b"OSError: [Errno 5]" in errors
                assert plane.counters["orphans"] == 1
            finally:
                reader.kill()
                for fd in plane.handed_down().values():
                    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", Form.DECODED)


def create_many(daemon: Daemon, count: int) -> None:
    """Cache files that nothing mounts."""
    for number in range(count):
        path = daemon.root / "blobs" / f"many{number}"
        path.touch()
        os.truncate(path, 65536)
        created = daemon.call("create", name=path.name, path=str(path), form="decoded", size=65536)
        assert created["errno"] == 0, created


@pytest.mark.root
def test_a_parked_keeper_with_many_objects(image: Image, tmp_path: Path) -> None:
    """It, and its twin: readers wait for the next daemon, which gets everything."""
    daemon = Daemon(tmp_path, grace=600.0)
    try:
        daemon.start()
        daemon.mount(image, tmp_path / "mnt")
        create_many(daemon, MANY)
        os.kill(daemon.pids()[0], signal.SIGKILL)  # the next one gets the low numbers from the supervisor
        wait_until(lambda: daemon.call("status")["generation"] == 2)
        (daemon.source / "silent").touch()
        reader = start_reader(tmp_path / "mnt")
        wait_until(lambda: daemon.call("status")["requests"])
        assert daemon.stop() == 0
        wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
        (daemon.source / "silent").unlink()
        daemon.start()
        assert results(reader) == image.files
        status = daemon.call("status")
        assert status["objects"] == MANY + len(image.data) and status["fenced"] == []
    finally:
        daemon.close()
