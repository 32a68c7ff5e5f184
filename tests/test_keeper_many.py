"""A node with many cache files: the keeper's descriptors have numbers beyond what select(2) takes."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from loader.keeper.config import KeeperConfig
from loader.keeper.nursery import Nursery, _Forked
from loader.keeper.readable import readable
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
