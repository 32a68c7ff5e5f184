"""A daemon in a mount namespace of its own, as systemd's unit has one: it mounts for the machine all the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from loader.keeper.host import Host
from mounts import mountinfo
from mounts.namespace import is_mount_namespace
from tests.support.keeper_rig import REPOSITORY, SERVE, Daemon, Image, make_image, results, start_reader

pytestmark = pytest.mark.root

# Nothing reaches it from our namespace, and it sees no directory of ours that a mount could be made on.
APART = 'mount -t tmpfs apart "$1" && shift && exec "$@"'


class ApartDaemon(Daemon):
    """Started as the unit is: standard input is a descriptor of our mount namespace."""

    def __init__(self, directory: Path, hidden: Path) -> None:
        super().__init__(directory)
        self.hidden = hidden

    def start_process(self) -> None:
        serve = [sys.executable, "-c", SERVE, self.config.to_json()]
        apart = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", APART, "sh", str(self.hidden)]
        with open(self.log, "ab") as log, open("/proc/self/ns/mnt", "rb") as namespace:
            self.process = subprocess.Popen([*apart, *serve], cwd=REPOSITORY, stdin=namespace, stdout=log, stderr=log)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    return hidden / "mnt"


@pytest.fixture
def daemon(tmp_path: Path, target: Path) -> Iterator[ApartDaemon]:
    made = ApartDaemon(tmp_path, target.parent)
    made.start()
    yield made
    made.close()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", Form.DECODED, blobs=1, large=2, small=4)


def test_mounts_are_the_machines(daemon: ApartDaemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    assert results(start_reader(target)) == image.files
    assert [mount["target"] for mount in daemon.call("status")["mounts"]] == [str(target)]
    for pid in daemon.pids():
        assert Path(f"/proc/{pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
    assert daemon.call("umount", target=str(target))["errno"] == 0
    assert not os.path.ismount(target)


def test_what_is_no_directory(daemon: ApartDaemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    metadata = str(daemon.root / "images" / image.form.value)
    refused = daemon.call("mount", source=metadata, devices=[], options=[], target=f"{target}-none", objects=[])
    assert refused["errno"] == errno.ENOTDIR


def test_stop_and_start_again(daemon: ApartDaemon, image: Image, target: Path) -> None:
    """Through a parked keeper, to a daemon with another namespace."""
    daemon.mount(image, target)
    assert daemon.stop() == 0
    assert os.path.ismount(target)
    daemon.start()
    assert results(start_reader(target)) == image.files


def test_unguarded_mounts_are_taken_away(daemon: ApartDaemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    daemon.kill_all()
    daemon.start()
    assert not os.path.ismount(target)
    assert [item["target"] for item in daemon.call("status")["fenced"]] == [str(target)]


def test_only_a_mount_namespace_is_one() -> None:
    with open("/proc/self/ns/mnt", "rb") as mounts, open("/proc/self/ns/net", "rb") as net, open("/dev/null") as null:
        assert [is_mount_namespace(file.fileno()) for file in (mounts, net, null)] == [True, False, False]


def test_failures_come_out_of_the_thread() -> None:
    with open("/proc/self/ns/net", "rb") as net, pytest.raises(OSError, match="setns"):
        Host(net.fileno()).call(mountinfo)
    with open("/proc/self/ns/mnt", "rb") as mounts:
        assert Host(mounts.fileno()).call(mountinfo) == mountinfo()
        with pytest.raises(ZeroDivisionError):
            Host(mounts.fileno()).call(lambda: 1 / 0)
