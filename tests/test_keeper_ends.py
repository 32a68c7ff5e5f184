"""Ends at bad moments, in the decoded form: a disk that is full. A reader gets right bytes or an error, and what was
mounted goes on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from tests.support.keeper_rig import (
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


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", Form.DECODED)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def check_parked(daemon: Daemon, image: Image, target: Path) -> None:
    """A pair guards, and the next daemon goes on."""
    wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
    assert set(results(start_reader(target)).values()) == {f"errno {errno.EIO}"}
    (daemon.source / "silent").unlink(missing_ok=True)
    daemon.start()
    assert daemon.call("status")["fenced"] == []
    assert results(start_reader(target)) == image.files


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
