"""Ends at bad moments, in the decoded form: a stop in which the keeper dies, a start that fails, a disk that is full.
A reader gets right bytes or an error, and what was mounted goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fanotify
from erofs_builder.payload import Form
from loader.keeper import handover
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import receive_with_fds
from loader.keeper.host import Host
from loader.keeper.state import State
from loader.keeper.supervisor import Supervisor
from mounts import mountinfo
from tests.support.keeper_rig import (
    REPOSITORY,
    Daemon,
    Image,
    daemon_pids,
    make_image,
    results,
    start_reader,
    wait_until,
)
from tests.support.loop_disk import QuotaDisk

pytestmark = pytest.mark.root

# No process can be started as long as there is a file of this name, and no group is kept while there is another.
SERVE_IN_NEED = """
import errno, logging, os, subprocess, sys
from loader.keeper import supervisor
from loader.keeper.config import KeeperConfig
logging.basicConfig(format="supervisor: %(message)s", level=logging.INFO)
supervisor._STOP_PATIENCE = 1.0
start = subprocess.Popen
def popen(*arguments, **options):
    if os.path.exists(sys.argv[2]):
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    return start(*arguments, **options)
subprocess.Popen = popen
apply = supervisor.apply
def forgetful(fds, fields, received):
    apply(fds, {} if os.path.exists(sys.argv[3]) and fields.get("FDNAME") == "group" else fields, received)
supervisor.apply = forgetful
sys.exit(supervisor.run(KeeperConfig.from_json(sys.argv[1])))
"""


class DaemonInNeed(Daemon):
    @property
    def need(self) -> Path:
        return self.source / "need"

    @property
    def lost(self) -> Path:
        return self.source / "lost"

    def start_process(self) -> None:
        command = [sys.executable, "-c", SERVE_IN_NEED, self.config.to_json(), str(self.need), str(self.lost)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", Form.DECODED)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = DaemonInNeed(tmp_path, grace=2.0)
    made.start()
    yield made
    made.close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


@pytest.fixture
def reader(daemon: Daemon, image: Image, target: Path) -> subprocess.Popen[str]:
    """It waits for a registry that says nothing."""
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    started = start_reader(target)
    wait_until(lambda: daemon.call("status")["requests"])
    return started


def check(reader: subprocess.Popen[str], image: Image, *errors: int) -> None:
    for name, found in results(reader).items():
        assert found in (image.files[name], *(f"errno {error}" for error in (errno.EIO, *errors)))


def check_parked(daemon: Daemon, image: Image, target: Path) -> None:
    """A pair guards, and the next daemon goes on."""
    wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
    assert set(results(start_reader(target)).values()) == {f"errno {errno.EIO}"}
    (daemon.source / "silent").unlink(missing_ok=True)
    daemon.start()
    assert daemon.call("status")["fenced"] == []
    assert results(start_reader(target)) == image.files


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# A stop


def test_a_keeper_dies_just_before_a_stop(
    daemon: Daemon, image: Image, target: Path, reader: subprocess.Popen[str]
) -> None:
    kill(daemon.pids()[0])
    assert daemon.stop() == 0
    check(reader, image)
    check_parked(daemon, image, target)


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_keeper_dies_in_a_stop(
    daemon: Daemon, image: Image, target: Path, reader: subprocess.Popen[str], delay: float
) -> None:
    keeper, _ = daemon.pids()
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    time.sleep(delay)
    kill(keeper)
    assert daemon.process.wait(60) == 0
    check(reader, image)
    check_parked(daemon, image, target)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2])
def test_a_stop_while_a_keeper_starts(
    daemon: Daemon, image: Image, target: Path, reader: subprocess.Popen[str], delay: float
) -> None:
    """It has no handler for the signal yet."""
    keeper, _ = daemon.pids()
    kill(keeper)
    wait_until(lambda: "starting the next" in daemon.log.read_text())
    time.sleep(delay)
    assert daemon.stop() == 0
    check(reader, image)
    check_parked(daemon, image, target)


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_stop_while_a_keeper_takes_the_supervisors_place(
    daemon: Daemon, image: Image, target: Path, reader: subprocess.Popen[str], delay: float
) -> None:
    keeper, _ = daemon.pids()
    assert daemon.process is not None
    daemon.process.kill()
    wait_until(lambda: b"loader.keeper.supervisor" in Path(f"/proc/{keeper}/cmdline").read_bytes())
    time.sleep(delay)
    os.kill(keeper, signal.SIGTERM)
    daemon.process.wait()
    wait_until(lambda: keeper not in daemon_pids(daemon.root))
    check(reader, image)
    check_parked(daemon, image, target)


def test_a_stop_without_a_keeper(
    daemon: DaemonInNeed, image: Image, target: Path, reader: subprocess.Popen[str]
) -> None:
    """None can be started to do it in order: fenced, while the group is still held."""
    keeper, _ = daemon.pids()
    daemon.need.touch()
    kill(keeper)
    assert daemon.stop() == 1
    check(reader, image, errno.ENOENT)
    assert not any(mount.target == str(target) for mount in mountinfo("erofs"))
    assert not any(path.exists() for path in daemon.cache_files(image))
    daemon.need.unlink()
    daemon.start()
    assert [item["target"] for item in daemon.call("status")["fenced"]] == [str(target)]


# Processes that cannot be started


def test_no_keeper_can_be_started_for_a_while(
    daemon: DaemonInNeed, image: Image, target: Path, reader: subprocess.Popen[str]
) -> None:
    keeper, _ = daemon.pids()
    (daemon.source / "silent").unlink()
    daemon.need.touch()
    kill(keeper)
    wait_until(lambda: daemon.log.read_text().count("no more processes") >= 3)
    daemon.need.unlink()
    assert results(reader) == image.files
    assert daemon.call("status")["generation"] == 2


def test_what_a_keeper_alone_held_is_fenced(daemon: DaemonInNeed, image: Image, target: Path) -> None:
    """Its descriptors had not reached the supervisor, so its group was closed when it died."""
    assert daemon.stop() == 0
    daemon.lost.touch()
    daemon.start()
    daemon.mount(image, target)
    kill(daemon.pids()[0])
    wait_until(lambda: daemon.call("status")["generation"] >= 3)
    assert [item["target"] for item in daemon.call("status")["fenced"]] == [str(target)]
    daemon.mount(image, target)
    assert results(start_reader(target)) == image.files


# A start


def test_a_start_that_fails_leaves_the_guard(daemon: Daemon, image: Image, target: Path) -> None:
    """Another daemon answers at the socket; the parked keeper is asked, and goes on holding."""
    daemon.mount(image, target)
    assert daemon.stop() == 0
    guard = handover.places(daemon.config)[0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(daemon.config.socket))
        other.listen(1)
        daemon.start_process()
        assert daemon.process is not None
        assert daemon.process.wait(60) == 1
    assert "another daemon answers there" in daemon.log.read_text()
    assert guard.is_socket()
    check_parked(daemon, image, target)


def test_no_twin_wakes_beside_the_next_keeper(daemon: Daemon, image: Image, target: Path) -> None:
    """It is gone before the next daemon says that it has everything; if that never comes, there is another one."""
    daemon.mount(image, target)
    assert daemon.stop() == 0
    pair = set(daemon_pids(daemon.root))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(handover.places(daemon.config)[0]))
        while (packet := receive_with_fds(connection, 256))[0] != b"end":
            os.close(packet[1][0])
        wait_until(lambda: len(pair & set(daemon_pids(daemon.root))) == 1)
        time.sleep(0.2)
        assert len(daemon_pids(daemon.root)) == 1
    wait_until(lambda: len(set(daemon_pids(daemon.root)) - pair) == 1)
    check_parked(daemon, image, target)


def test_a_parked_keeper_that_is_killed_in_the_handover(daemon: Daemon, image: Image, target: Path) -> None:
    """Whoever takes over has everything by then."""
    daemon.mount(image, target)
    assert daemon.stop() == 0
    taken: list[dict[str, int]] = []

    def prepare(fds: dict[str, int]) -> None:
        taken.append(fds)
        wait_until(lambda: len(daemon_pids(daemon.root)) == 1)
        kill(daemon_pids(daemon.root)[0])

    handover.take_over(daemon.config, prepare)
    assert [{"group", "journal", "readers"} <= set(fds) for fds in taken] == [True]
    assert daemon_pids(daemon.root) == []
    for fd in taken[0].values():
        os.close(fd)


def test_a_parked_keeper_that_loses_patience_is_asked_again(daemon: Daemon, image: Image, target: Path) -> None:
    """It reads events again by then: nobody may go on beside it."""
    daemon.mount(image, target)
    assert daemon.stop() == 0
    taken: list[dict[str, int]] = []

    def prepare(fds: dict[str, int]) -> None:
        taken.append(fds)
        if len(taken) == 1:
            wait_until(lambda: len(daemon_pids(daemon.root)) == 1)
            wait_until(lambda: len(daemon_pids(daemon.root)) == 2, 20)  # a new twin

    handover.take_over(daemon.config, prepare)
    assert len(taken) == 2
    wait_until(lambda: daemon_pids(daemon.root) == [], 5)
    for fd in [fd for fds in taken for fd in fds.values()]:
        os.close(fd)


def test_a_group_without_its_journal_is_let_go_of_before_the_fence(tmp_path: Path) -> None:
    """Else the truncation of what is fenced would wait for an answer of this very process."""
    config = KeeperConfig(root=tmp_path, socket=tmp_path / "control.sock")
    data = tmp_path / "blobs/decoded/a/data"
    data.parent.mkdir(parents=True)
    data.write_bytes(bytes(8192))
    state = State.load(tmp_path)
    item = state.new_object("fanotify", name="decoded/a", path=str(data), form="decoded", size=8192)
    item.mounted = True
    state.save()
    group = fanotify.init()
    fanotify.mark(group, data)
    fds = {"group": group}
    supervisor = Supervisor(config, fds, os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT), Host(None))
    try:
        with in_time(20):
            supervisor.prepare({})
        assert "group" not in fds and not data.exists()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in supervisor._handlers.items():
            signal.signal(number, handler)
        supervisor._close()


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """SIGALRM ends this process if it takes longer: it cannot be helped in another way."""
    handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


# A full disk


@pytest.fixture
def full(tmp_path: Path, image: Image, target: Path) -> Iterator[tuple[Daemon, QuotaDisk]]:
    """A daemon with a mount, whose ROOT holds no byte and no file more."""
    with QuotaDisk(tmp_path / "q", 32 << 20) as disk:
        made = Daemon(tmp_path, grace=0.0)
        made.root = disk.limited / "root"
        made.config = replace(made.config, root=made.root, socket=tmp_path / "control.sock")
        try:
            made.start()
            made.mount(image, target)
            disk.fill()
            with pytest.raises(OSError):
                for number in range(10000):
                    (disk.limited / f"more-{number}").touch()
            yield made, disk
        finally:
            made.close()
            wait_until(lambda: not daemon_pids(made.root))


def test_a_supervisor_dies_on_a_full_disk(full: tuple[Daemon, QuotaDisk], image: Image, target: Path) -> None:
    daemon, disk = full
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    wait_until(lambda: daemon.call("status")["generation"] == 2)
    disk.set_limit("none")
    assert results(start_reader(target)) == image.files
    assert daemon.call("status")["fenced"] == []


def test_a_stop_on_a_full_disk(full: tuple[Daemon, QuotaDisk], image: Image, target: Path) -> None:
    daemon, disk = full
    assert daemon.stop() == 0
    disk.set_limit("none")
    check_parked(daemon, image, target)
