"""The keeper on fanotify, natively: answers, errors, objects, mounts. Readers are processes of their own."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from mounts import mountinfo, umount2
from tests.support.keeper_rig import Daemon, Image, daemon_pids, make_image, results, start_reader, wait_until

pytestmark = pytest.mark.root


@pytest.fixture(params=list(Form), ids=lambda form: form.value)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    return make_image(tmp_path / "image", request.param)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, deadline=2.0)
    made.start()
    yield made
    made.close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def all_refused(found: dict[str, str], image: Image) -> bool:
    return found == dict.fromkeys(image.files, f"errno {errno.EIO}")


def test_every_byte(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    assert results(start_reader(target)) == image.files
    counters = daemon.call("status")["counters"]
    assert counters["allowed"] == counters["events"] > 0
    assert counters["denied"] == counters["holes"] == 0


def test_refusal_is_an_error_and_passes(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    (daemon.source / "refuse").touch()
    assert all_refused(results(start_reader(target)), image)
    (daemon.source / "refuse").unlink()
    assert results(start_reader(target)) == image.files


def test_a_hole_is_never_allowed(daemon: Daemon, image: Image, target: Path) -> None:
    """A worker that says it is done, and has written nothing."""
    daemon.mount(image, target)
    (daemon.source / "hole").touch()
    assert all_refused(results(start_reader(target)), image)
    assert daemon.call("status")["counters"]["holes"] > 0
    (daemon.source / "hole").unlink()
    assert results(start_reader(target)) == image.files


def test_deadline(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    with subprocess.Popen(
        ["cat", str(target / "blob0-file1")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as cat:
        _, text = cat.communicate(timeout=60)
    assert cat.returncode != 0 and b"Input/output error" in text
    (daemon.source / "silent").unlink()
    assert results(start_reader(target)) == image.files


def test_killed_reader(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    reader = start_reader(target)
    wait_until(lambda: daemon.call("status")["requests"])
    reader.kill()
    reader.communicate(timeout=30)
    (daemon.source / "silent").unlink()
    assert results(start_reader(target)) == image.files


def test_complete_objects_raise_no_events(daemon: Daemon, image: Image, target: Path) -> None:
    objects = daemon.mount(image, target)
    refused = daemon.call("complete", object=objects[0])
    assert refused["errno"] == errno.EINVAL and "holes" in refused["message"]
    for number, source, cached in zip(objects, image.data, daemon.cache_files(image), strict=True):
        with subprocess.Popen(["dd", f"if={cached}", "of=/dev/null", "bs=1M"], stderr=subprocess.DEVNULL) as reader:
            assert reader.wait(60) == 0  # a plain reader of the cache file fills it whole
        assert cached.read_bytes()[: source.stat().st_size] == source.read_bytes()
        assert daemon.call("complete", object=number)["errno"] == 0
    before = daemon.call("status")["counters"]["events"]
    assert results(start_reader(target)) == image.files
    assert daemon.call("status")["counters"]["events"] == before
    assert daemon.call("mark", object=objects[0])["errno"] == 0


def test_truncating_a_marked_file_is_refused(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    command = ["truncate", "-s", "0", str(daemon.cache_files(image)[0])]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=30, check=False).returncode != 0
    assert results(start_reader(target)) == image.files


def test_objects(daemon: Daemon, image: Image, target: Path) -> None:
    objects = daemon.mount(image, target)
    path = str(daemon.cache_files(image)[0])
    again = daemon.call("create", name=image.data[0].name, path=path, form=image.form.value, size=1)
    assert again["object"] == objects[0]
    assert daemon.call("release", object=objects[0])["errno"] == errno.EBUSY
    umount2(target)  # by somebody else
    wait_until(lambda: daemon.call("status")["mounts"] == [])
    for number in objects:
        assert daemon.call("release", object=number)["errno"] == 0
        assert daemon.call("release", object=number)["errno"] in (0, errno.ENOENT)
    for cached in daemon.cache_files(image):
        cached.unlink()
    wait_until(lambda: daemon.call("status")["objects"] == 0)


def test_a_lazily_unmounted_file_stays_guarded(daemon: Daemon, image: Image, target: Path) -> None:
    """Released while somebody still has a file open: what is missing is an error, not zeros."""
    objects = daemon.mount(image, target)
    script = (
        "import os, sys; fd = os.open(sys.argv[1], 0); print(fd, flush=True); sys.stdin.read(); os.pread(fd, 65536, 0)"
    )
    with subprocess.Popen(
        ["python3", "-c", script, str(target / "blob0-file1")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert daemon.call("umount", target=str(target), lazy=True)["errno"] == 0
        for number in objects:
            assert daemon.call("release", object=number)["errno"] == 0
        for path in daemon.cache_files(image):
            path.unlink()
        _, errors = holder.communicate(timeout=30)
    assert holder.returncode != 0
    assert b"OSError" in errors


@pytest.mark.parametrize(
    ("call", "arguments", "number"),
    [
        ("create", {"path": "/nowhere/at/all"}, errno.EPERM),
        ("create", {"path": "/proc/version", "form": "encoded"}, errno.EACCES),
        ("create", {"form": "other", "path": "/x"}, errno.EINVAL),
        ("create", {"size": "x", "path": "/x"}, errno.EINVAL),
        ("release", {"object": 99}, errno.ENOENT),
        ("complete", {}, errno.EINVAL),
        ("mount", {"target": "/nowhere", "objects": [99]}, errno.ENOENT),
        ("mount", {"target": "/nowhere", "source": "/nowhere"}, errno.EPERM),
        ("mount", {}, errno.EINVAL),
        ("umount", {"target": "/nowhere"}, errno.ENOENT),
        ("cull", {"directory": "x", "name": "y"}, errno.EOPNOTSUPP),
        ("fly", {}, errno.ENOSYS),
        ("stop", {"mode": "sideways"}, errno.EINVAL),
    ],
)
def test_calls_that_fail_say_why(tmp_path: Path, call: str, arguments: dict[str, object], number: int) -> None:
    daemon = Daemon(tmp_path)
    try:
        daemon.start()
        defaults: dict[str, object] = {"name": "n", "form": "encoded", "size": 1} if call == "create" else {}
        answer = daemon.call(call, **(defaults | arguments))
        if (call, arguments.get("path")) == ("create", "/proc/version"):
            assert answer["errno"] in (errno.EACCES, errno.EPERM, errno.EIO, errno.EOPNOTSUPP, errno.EINVAL)
        else:
            assert answer["errno"] == number, answer
        assert answer["message"]
        assert daemon.call("status")["objects"] == 0
    finally:
        daemon.close()


def test_no_descriptor_is_left(tmp_path: Path, image: Image, target: Path) -> None:
    """Of events, mounts and released objects: keeper and supervisor have as many as before."""
    daemon = Daemon(tmp_path, standby=False)

    def descriptors() -> tuple[int, int]:
        assert daemon.process is not None
        pids = (daemon.pids()[0], daemon.process.pid)
        return tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)  # type: ignore[return-value]

    try:
        daemon.start()
        before = descriptors()
        objects = daemon.mount(image, target)
        assert results(start_reader(target)) == image.files
        assert daemon.call("umount", target=str(target))["errno"] == 0
        for number in objects:
            assert daemon.call("release", object=number)["errno"] == 0
        wait_until(lambda: descriptors() == before)
    finally:
        daemon.close()


def test_signals_that_ask(daemon: Daemon, image: Image, target: Path) -> None:
    daemon.mount(image, target)
    (daemon.source / "silent").touch()
    reader = start_reader(target)
    wait_until(lambda: daemon.call("status")["requests"])
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "in flight: {'object'" in daemon.log.read_text() and "_on_signal" in daemon.log.read_text())
    (daemon.source / "silent").unlink()
    worker = daemon.pids()[1]
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: daemon.pids()[1] != worker)
    assert results(reader) == image.files


def test_leaves_nothing(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    assert daemon.call("stop", mode="umount")["errno"] == 0
    assert daemon.process is not None
    assert daemon.process.wait(60) == 0
    assert daemon_pids(daemon.root) == []
    assert not (daemon.root / "control.sock").exists()
    assert not any(mount.target.startswith(str(tmp_path)) for mount in mountinfo("erofs"))


def test_a_worker_that_cannot_start(tmp_path: Path) -> None:
    """It is tried again, with pauses; the daemon can still be stopped."""
    daemon = Daemon(tmp_path)
    daemon.config = replace(daemon.config, worker=(sys.executable, "-c", "raise SystemExit(3)"))
    daemon.start_process()
    wait_until(lambda: daemon.log.read_text().count("the worker ended") >= 3)
    assert daemon.stop() == 0
