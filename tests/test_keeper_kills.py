"""Killing: workers, keepers and supervisors under parallel reads. Every byte is compared, no reader may be stuck."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from erofs_builder.payload import Form
from loader.keeper import fence
from loader.keeper.host import Host
from loader.keeper.state import MountRecord, State
from mounts import mountinfo, umount2
from mounts.readahead import backing_devices, get_readahead
from tests.support.keeper_rig import Daemon, Image, daemon_pids, make_image, results, start_reader, wait_until

pytestmark = pytest.mark.root
READERS = 4
HOST = cast("Host", SimpleNamespace(erofs_targets=lambda: {"/mnt"}, call=lambda function: function()))


@pytest.fixture(params=list(Form), ids=lambda form: form.value)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", request.param)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, delay=0.01, grace=4.0)
    made.start()
    yield made
    made.close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def start_readers(target: Path) -> list[subprocess.Popen[str]]:
    return [start_reader(target, seed) for seed in range(READERS)]


def check(readers: list[subprocess.Popen[str]], image: Image) -> None:
    for reader in readers:
        assert results(reader) == image.files


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def parked(daemon: Daemon) -> tuple[int, int]:
    """The parked keeper and its twin."""
    one, other = daemon_pids(daemon.root)
    return (one, other) if parent(other) == one else (other, one)


def is_mounted(target: Path) -> bool:
    return any(mount.target == str(target) for mount in mountinfo("erofs"))


def start_over(daemon: Daemon, image: Image, target: Path, objects: list[int]) -> list[int]:
    """Forget what is cached, in user space and in the kernel, and mount again."""
    assert daemon.call("umount", target=str(target))["errno"] == 0
    for number in objects:
        assert daemon.call("release", object=number)["errno"] == 0
    for path in daemon.cache_files(image):
        path.unlink()
    return daemon.mount(image, target)


def test_worker_dies(daemon: Daemon, image: Image, target: Path) -> None:
    """At least 20 SIGKILLs while readers read cold files. (bench/storm kills thousands, and every process.)"""
    rng = random.Random(1)
    objects = daemon.mount(image, target)
    done = 0
    while done < 20:
        readers = start_readers(target)
        while any(reader.poll() is None for reader in readers) and done < 20:
            _, worker = daemon.pids()
            time.sleep(rng.uniform(0, 0.05))
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                done += 1
        check(readers, image)
        objects = start_over(daemon, image, target, objects)
    check([start_reader(target)], image)
    assert daemon.call("status")["generation"] == 1


def test_a_killed_worker_is_replaced_without_error(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    readers = start_readers(target)
    wait_until(lambda: daemon.call("status")["requests"])
    (daemon.source / "silent").unlink()
    os.kill(daemon.pids()[1], signal.SIGKILL)
    check(readers, image)
    assert daemon.call("status")["counters"]["denied"] == 0


def test_keeper_dies_with_requests_in_flight(daemon: Daemon, image: Image, target: Path) -> None:
    """What was in the journal is served by the next keeper: no error, though the keeper never answered."""
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    readers = start_readers(target)
    wait_until(lambda: daemon.call("status")["requests"])
    keeper, _ = daemon.pids()
    (daemon.source / "silent").unlink()
    os.kill(keeper, signal.SIGKILL)
    check(readers, image)
    status = daemon.call("status")
    assert status["generation"] == 2
    assert status["counters"]["denied"] == 0
    assert [mount["target"] for mount in status["mounts"]] == [str(target)]


def paused_by(daemon: Daemon, image: Image, target: Path, pause: float) -> str:
    """The backing device of a new mount without readahead. (With another new one at the same moment there is none.)"""
    for _ in range(5):
        before = backing_devices()
        daemon.mount(image, target, pause)
        for device in backing_devices() - before:
            if get_readahead(device) == 0:
                return device
        assert daemon.call("umount", target=str(target))["errno"] == 0
    raise AssertionError("never was there only one new backing device")


def test_readahead_that_a_dead_keeper_took_is_given_back(daemon: Daemon, image: Image, target: Path) -> None:
    device = paused_by(daemon, image, target, 600.0)
    assert results(start_reader(target)) == image.files
    os.kill(daemon.pids()[0], signal.SIGKILL)
    wait_until(lambda: daemon.call("status")["generation"] == 2)
    assert get_readahead(device) > 0
    assert State.load(daemon.root).paused == {}


def test_readahead_comes_back(daemon: Daemon, image: Image, target: Path) -> None:
    device = paused_by(daemon, image, target, 1.0)
    wait_until(lambda: get_readahead(device) > 0)
    daemon.call("umount", target=str(target))  # saves
    assert State.load(daemon.root).paused == {}


def test_keeper_dies_often(daemon: Daemon, image: Image, target: Path) -> None:
    """An event that was read but not yet in the journal is denied: a reader may see EIO for it, never a wrong byte."""
    objects = daemon.mount(image, target)
    for _ in range(4):
        readers = start_readers(target)
        time.sleep(0.1)
        os.kill(daemon.pids()[0], signal.SIGKILL)
        for reader in readers:
            for name, found in results(reader).items():
                assert found in (image.files[name], f"errno {errno.EIO}")
        objects = start_over(daemon, image, target, objects)
    check(start_readers(target), image)


def test_supervisor_dies(daemon: Daemon, image: Image, target: Path) -> None:
    """The keeper takes its place, and the mounts go on."""
    daemon.mount(image, target)
    readers = start_readers(target)
    before, _ = daemon.pids()
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    check(readers, image)
    wait_until(lambda: daemon.call("status")["generation"] == 2)
    keeper, _ = daemon.pids()
    assert Path(f"/proc/{keeper}/stat").read_text().rpartition(")")[2].split()[1] == str(before)
    os.kill(before, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{before}").exists())


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1, 0.15, 0.25])
def test_supervisor_dies_while_the_next_keeper_starts(daemon: Daemon, image: Image, target: Path, delay: float) -> None:
    """That keeper holds everything by then, and takes the supervisor's place, in whatever moment."""
    daemon.mount(image, target)
    readers = start_readers(target)
    supervisor = daemon.process
    assert supervisor is not None
    keeper, _ = daemon.pids()
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: set(children(supervisor.pid)) - {keeper})
    time.sleep(delay)
    supervisor.kill()
    supervisor.wait()
    for reader in readers:
        for name, found in results(reader).items():
            assert found in (image.files[name], f"errno {errno.EIO}")
    check(start_readers(target), image)
    assert "the supervisor is gone: taking its place" in daemon.log.read_text()
    assert [mount["target"] for mount in daemon.call("status")["mounts"]] == [str(target)]


def test_everything_dies(daemon: Daemon, image: Image, target: Path) -> None:
    """Encoded: errors while nobody is there, then the mount goes on. Decoded: fenced, never served again."""
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    reader = start_reader(target)
    wait_until(lambda: daemon.call("status")["requests"])
    daemon.kill_all()
    (daemon.source / "silent").unlink()
    found = results(reader)
    if image.form is Form.ENCODED:
        assert set(found.values()) <= {f"errno {errno.EUCLEAN}", f"errno {errno.EIO}"} | set(image.files.values())
        assert any(value.startswith("errno") for value in found.values())
    held = os.open(target / "blob0-file1", os.O_RDONLY)
    daemon.start()
    status = daemon.call("status")
    if image.form is Form.ENCODED:
        assert status["fenced"] == []
        assert os.pread(held, 10, 0) != bytes(10)
        check(start_readers(target), image)
    else:
        assert [item["target"] for item in status["fenced"]] == [str(target)]
        assert not is_mounted(target)
        with pytest.raises(OSError):
            os.pread(held, 65536, 0)
        assert not any(path.exists() for path in daemon.cache_files(image))
        daemon.mount(image, target)
        check(start_readers(target), image)
        assert daemon.call("status")["fenced"] == []
    os.close(held)


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """A file that can be neither written, truncated nor removed."""
    subprocess.run(["chattr", "+i", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


def test_a_file_that_cannot_be_fenced_keeps_nothing_else_from_it(daemon: Daemon, tmp_path: Path) -> None:
    """Everything dies. Both mounts go, the daemon starts, and who still has that file open gets errors."""
    images = [make_image(tmp_path / f"image{seed}", Form.DECODED, seed=seed, blobs=1) for seed in (1, 2)]
    targets = [tmp_path / f"mnt{number}" for number in range(2)]
    for image, target in zip(images, targets, strict=True):
        daemon.mount(image, target)
    (stuck,), (free,) = (daemon.cache_files(image) for image in images)
    held = os.open(targets[0] / "blob0-file1", os.O_RDONLY)
    daemon.kill_all()
    with immutable(stuck):
        daemon.start()
        status = daemon.call("status")
        assert sorted(item["target"] for item in status["fenced"]) == sorted(map(str, targets))
        assert not any(is_mounted(target) for target in targets)
        assert stuck.exists() and not free.exists()
        for _ in range(2):
            with pytest.raises(OSError):
                os.pread(held, 65536, 0)
            os.kill(daemon.pids()[0], signal.SIGKILL)  # the next one guards it as well
            wait_until(lambda: daemon.call("status")["generation"] > status["generation"])
        create = {"name": images[0].data[0].name, "form": "decoded", "size": images[0].data[0].stat().st_size}
        assert daemon.call("create", path=str(stuck), **create)["errno"] == errno.EROFS
    assert f"cannot fence {stuck}" in daemon.log.read_text()
    stuck.unlink()
    wait_until(lambda: daemon.call("status")["objects"] == 0)
    for image, target in zip(images, targets, strict=True):
        daemon.mount(image, target)
        check([start_reader(target)], image)
    os.close(held)


@contextlib.contextmanager
def stopped_while_busy(
    daemon: Daemon, image: Image, target: Path, meanwhile: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """A daemon that is to unmount was stopped while somebody had a file open, who gets errors for what is missing."""
    held = -1
    try:
        daemon.start()
        daemon.mount(image, target)
        held = os.open(target / "blob0-file1", os.O_RDONLY)
        with meanwhile():
            assert daemon.stop() == 0
            assert not is_mounted(target)
            with pytest.raises(OSError):
                os.pread(held, 65536, 0)
            yield
    finally:
        if held >= 0:
            os.close(held)
        daemon.close()


def test_stop_with_umount_stays_where_it_cannot_fence(tmp_path: Path, target: Path) -> None:
    """Who still has a file open is guarded until somebody can do more about it."""
    image = make_image(tmp_path / "image", Form.DECODED, blobs=1)
    daemon = Daemon(tmp_path, on_stop="umount", grace=0.0)
    with stopped_while_busy(daemon, image, target, lambda: immutable(daemon.cache_files(image)[0])):
        assert daemon_pids(daemon.root)


def test_a_page_cache_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container /proc/sys may be read-only: the start goes on, and is not tried again for ever."""
    monkeypatch.setattr(fence, "_DROP_CACHES", tmp_path / "nowhere/drop_caches")
    state = State.load(tmp_path)
    item = state.new_object("fanotify", path=str(tmp_path / "data"), form="decoded", mounted=True)
    state.mounts["/mnt"] = MountRecord("/mnt", "fanotify", "metadata", objects=[item.id])
    monkeypatch.setattr(fence, "umount2", lambda _target, _flags: None)
    fence.fence_unguarded(state, HOST)
    again = State.load(tmp_path)
    assert not again.objects and not again.mounts
    assert "page cache could not be dropped" in again.fenced[0]["reason"]


def test_a_mount_that_cannot_go_is_not_called_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State.load(tmp_path)
    item = state.new_object("cachefiles", mounted=True)
    state.mounts["/mnt"] = MountRecord("/mnt", "cachefiles", "none", objects=[item.id])

    def refused(target: str, _flags: int) -> None:
        raise PermissionError(errno.EPERM, "not permitted", target)

    monkeypatch.setattr(fence, "umount2", refused)
    fence.fence_unguarded(state, HOST)
    again = State.load(tmp_path)
    assert list(again.mounts) == ["/mnt"] and not again.fenced


def test_stop_and_start_with_mounts_kept(daemon: Daemon, image: Image, target: Path) -> None:
    """Nobody is stuck while the daemon is away, nobody gets zeros; afterwards the mount goes on."""
    daemon.mount(image, target)
    assert results(start_reader(target, 5)).keys() == image.files.keys()
    assert daemon.stop() == 0
    assert is_mounted(target)
    away = results(start_reader(target))
    for name, found in away.items():
        assert found == image.files[name] or found.startswith("errno")
    daemon.start()
    check(start_readers(target), image)
    umount2(target)


def test_stop_with_cold_mounts_kept(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    assert daemon.stop() == 0
    reader = start_reader(target)
    found = results(reader)
    assert set(found.values()) == {f"errno {errno.EIO}"}
    daemon.start()
    assert daemon.call("status")["fenced"] == []
    check(start_readers(target), image)


def test_restart_is_not_noticed(daemon: Daemon, image: Image, target: Path) -> None:
    """A restart within the grace of a parked keeper: readers wait, and see nothing of it."""
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    readers = start_readers(target)
    wait_until(lambda: daemon.call("status")["requests"])
    assert daemon.stop() == 0
    kept = json.loads((daemon.root / "keeper.json").read_text())  # for an older version too, that knows no other file
    assert [mount["target"] for mount in kept["mounts"]] == [str(target)]
    (daemon.source / "silent").unlink()
    daemon.start()
    check(readers, image)


def test_a_parked_keeper_has_a_twin(daemon: Daemon, tmp_path: Path, target: Path) -> None:
    """Killed one after the other, each time the other one goes on guarding: errors, no zeros, no fence needed."""
    image = make_image(tmp_path / "image", Form.DECODED)
    daemon.mount(image, target)
    assert daemon.stop() == 0
    for _ in range(3):
        wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
        os.kill(parked(daemon)[0], signal.SIGKILL)
        assert set(results(start_reader(target)).values()) == {f"errno {errno.EIO}"}
    wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
    first, twin = parked(daemon)
    os.kill(twin, signal.SIGKILL)
    wait_until(lambda: twin not in daemon_pids(daemon.root) and len(daemon_pids(daemon.root)) == 2)
    guards = set(daemon_pids(daemon.root))
    daemon.start()
    assert daemon.call("status")["fenced"] == []
    check(start_readers(target), image)
    wait_until(lambda: not guards & set(daemon_pids(daemon.root)))


def test_a_start_with_another_plane_leaves_the_parked_keeper_alone(
    daemon: Daemon, tmp_path: Path, target: Path
) -> None:
    """It cannot serve these mounts, and must not be the last to hold what guards them."""
    image = make_image(tmp_path / "image", Form.DECODED)
    daemon.mount(image, target)
    assert daemon.stop() == 0
    wait_until(lambda: len(daemon_pids(daemon.root)) == 2)
    right, daemon.config = daemon.config, replace(daemon.config, plane="cachefiles")
    daemon.start_process()
    assert daemon.process is not None and daemon.process.wait() != 0
    assert "mounts of plane fanotify are still held" in daemon.log.read_text()
    assert set(results(start_reader(target)).values()) == {f"errno {errno.EIO}"}
    daemon.config = right
    daemon.start()
    assert daemon.call("status")["fenced"] == []
    check([start_reader(target)], image)


def test_stop_with_umount(tmp_path: Path, image: Image, target: Path) -> None:
    daemon = Daemon(tmp_path, on_stop="umount")
    try:
        daemon.start()
        daemon.mount(image, target)
        check([start_reader(target)], image)
        assert daemon.stop() == 0
        assert not is_mounted(target)
        assert daemon_pids(daemon.root) == []
    finally:
        daemon.close()


def test_stop_with_umount_of_a_busy_mount(tmp_path: Path, image: Image, target: Path) -> None:
    """It goes lazily; whoever still has files open gets errors for what is missing."""
    daemon = Daemon(tmp_path, on_stop="umount")
    with stopped_while_busy(daemon, image, target, contextlib.nullcontext):
        assert daemon_pids(daemon.root) == []
