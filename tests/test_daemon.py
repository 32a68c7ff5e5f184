"""The daemon as a whole: a real registry, the kernel's EROFS, readers in other processes, and all that breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.worker.outages import TRY_AGAIN
from tests.support.daemon import LOADER, Daemon, convert, drop_caches, make_tree, read_all, result, start_reader
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
FORMS = ("encoded", "decoded")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A registry's address and what its one image, `sample:1`, holds."""
    directory = tmp_path_factory.mktemp("published")
    digests = make_tree(directory / "tree")
    with docker_registry(directory / "registry") as address:
        convert(directory / "tree", f"docker://{address}/sample:1")
        yield address, digests


@pytest.fixture
def registry(published: tuple[str, dict[str, str]]) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(published[0]) as proxy:
        yield proxy


@pytest.fixture(params=FORMS)
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "d", "--form", request.param, "--deadline", "30") as running:
        yield running


def _image(registry: FaultyRegistry) -> str:
    return f"docker://{registry.address}/sample:1"


def test_many_readers_get_right_bytes_from_one_fetch_each(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    target = daemon.mount(_image(registry))
    readers = [start_reader(target, seed) for seed in range(9)]
    for reader in readers:
        assert result(reader) == published[1]
    assert registry.overlaps() == []
    counters = daemon.counters()
    assert counters["requests_failed"] == 0
    assert counters["frames_demanded"] + counters["frames_ahead"] > 20
    assert counters["fetched_bytes"] >= sum(last - first + 1 for _, first, last in registry.ranges)


def test_a_second_mount_and_cold_page_cache_fetch_nothing(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    image = _image(registry)
    assert read_all(daemon.mount(image)) == published[1]
    fetched = len(registry.ranges)
    drop_caches()
    assert read_all(daemon.mount(image, "second")) == published[1]
    assert len(registry.ranges) == fetched


def test_corrupt_bytes_are_errors_and_heal(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    target = daemon.mount(_image(registry))
    registry.corrupt = True
    seen = read_all(target)
    # Every frame is broken, each once in a while by its neighbour's side: what was read at all was right.
    assert any(value == "errno 5" for value in seen.values())
    assert all(value in ("errno 5", "errno 117", published[1][name]) for name, value in seen.items())
    assert daemon.counters()["corrupt_frames"] > 0
    assert any("expected sha256" in error for error in daemon.command("status")["source_errors"].values())
    registry.corrupt = False
    for _ in range(10):  # the first try after a failure has a second, which is little on a busy machine
        time.sleep(TRY_AGAIN)
        if (seen := read_all(target, 1)) == published[1]:
            break
        assert all(value in ("errno 5", published[1][name]) for name, value in seen.items())
    assert seen == published[1]


@pytest.mark.parametrize("fault", ["refuse", "off", "cut"])
def test_a_transient_failure_only_delays(
    tmp_path: Path, registry: FaultyRegistry, published: tuple[str, dict[str, str]], fault: str
) -> None:
    with Daemon(tmp_path / "d", "--deadline", "60") as daemon:
        target = daemon.mount(_image(registry))
        setattr(registry, fault, 503 if fault == "refuse" else True)
        reader = start_reader(target, 1)
        while not daemon.counters()["fetch_retries"]:
            time.sleep(0.05)
        setattr(registry, fault, None if fault == "refuse" else False)
        assert result(reader) == published[1]
        assert daemon.counters()["requests_failed"] == 0


def test_a_failure_that_lasts_is_an_error_at_the_deadline(tmp_path: Path, registry: FaultyRegistry) -> None:
    with Daemon(tmp_path / "d", "--deadline", "1") as daemon:
        target = daemon.mount(_image(registry))
        registry.off = True
        reader = start_reader(target / "large", 1)
        assert next(iter(reader.stdout or ())).endswith("errno 5\n")
        reader.kill()
        reader.communicate()
        assert daemon.counters()["requests_expired"] > 0


def test_killed_workers_are_not_noticed(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    target = daemon.mount(_image(registry))
    kills = 0
    for seed in range(4):
        readers = [start_reader(target, seed * 10 + number) for number in range(4)]
        while any(reader.poll() is None for reader in readers) and kills < 40:
            os.kill(daemon.worker(), signal.SIGKILL)
            kills += 1
        for reader in readers:
            assert result(reader) == published[1]
        drop_caches()
    assert kills >= 4


def test_a_restart_keeps_mounts_and_needs_no_registry(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    target = daemon.mount(_image(registry))
    assert read_all(target) == published[1]
    daemon.stop()
    registry.off = True
    daemon.start()
    drop_caches()
    assert read_all(target) == published[1]
    assert [image["mounts"] for image in daemon.command("list")] == [[str(target)]]


def test_a_remount_needs_no_registry(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    image = _image(registry)
    target = daemon.mount(image)
    assert read_all(target) == published[1]
    daemon.command("umount", str(target))
    daemon.command("stop", "--umount")
    daemon.wait()
    registry.off = True
    daemon.start()
    assert read_all(daemon.mount(image)) == published[1]


def test_prefetch_fetches_all_and_the_rest_is_local(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    image = _image(registry)
    target = daemon.mount(image)
    part = daemon.command("prefetch", image, "/large/3")
    assert 0 < part["total"] < 2_000_000
    whole = daemon.command("prefetch", image)
    assert whole["finished"]
    assert whole["fetched"] == whole["total"] > part["total"]
    assert daemon.command("prefetch", image)["total"] == 0
    registry.off = True
    assert read_all(target) == published[1]
    assert registry.overlaps() == []


def test_an_image_that_nothing_has_opened_yet(
    daemon: Daemon, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    """Its data has no file yet, and there may be metadata only of the form that the daemon does not serve."""
    (other,) = set(FORMS) - {daemon.command("status")["form"]}
    daemon.command("add", _image(registry), "--form", other)
    assert daemon.command("scrub")["skipped"] == []
    assert daemon.command("prefetch", _image(registry))["finished"]
    registry.off = True
    target = daemon.directory / "mnt"
    target.mkdir()
    daemon.command("mount", _image(registry), str(target), "--form", other)
    assert read_all(target) == published[1]


def test_a_mistake_in_the_configuration_stops_no_worker(
    tmp_path: Path, registry: FaultyRegistry, published: tuple[str, dict[str, str]]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('quota = "1G"\n')
    with Daemon(tmp_path / "d", command=[*LOADER, "--config", str(file)]) as daemon:
        target = daemon.mount(_image(registry))
        for text, quota in (('quota = "2G"\n', 2 << 30), ("quota = [", 2 << 30)):
            file.write_text(text)
            worker = daemon.worker()
            daemon.signal(signal.SIGHUP)
            until = time.monotonic() + 30
            while daemon.worker() == worker and time.monotonic() < until:
                time.sleep(0.05)
            assert daemon.worker() != worker
            assert daemon.command("stats")["cache"]["quota_bytes"] == quota
        assert "the settings stay as they were" in daemon.log.read_text()
        assert read_all(target) == published[1]


def test_removed_images_are_collected(daemon: Daemon, registry: FaultyRegistry) -> None:
    image = _image(registry)
    target = daemon.mount(image)
    read_all(target)
    busy = daemon.run("remove", image)
    assert busy.returncode == 14
    assert "mounted" in busy.stderr
    with next(path for path in target.rglob("*") if path.is_file()).open("rb"):
        busy = daemon.run("umount", str(target))
        assert busy.returncode == 14 and "--lazy" in busy.stderr
    assert daemon.command("gc")["freed_bytes"] == 0
    daemon.command("umount", str(target))
    daemon.command("remove", image)
    until = time.monotonic() + 20
    while (found := daemon.command("gc", "--dry-run")["blobs"]) != 1 and time.monotonic() < until:
        time.sleep(0.5)  # the kernel closes a file system's files when it gets to it, and we look every five seconds
    assert found == 1
    assert daemon.command("gc")["freed_bytes"] > 1_000_000
    assert daemon.command("stats")["cache"]["allocated_bytes"] == 0


def test_what_was_evicted_does_not_stay_open(daemon: Daemon, registry: FaultyRegistry) -> None:
    """The worker kept what it knew of every file that it had ever read of, and with it the file's maps."""
    for _ in range(8):
        target = daemon.mount(_image(registry))
        read_all(target)
        daemon.command("umount", str(target))
        daemon.command("gc", "--all")
    descriptors = Path(f"/proc/{daemon.worker()}/fd").iterdir()
    assert not [name for name in map(os.readlink, descriptors) if "/evicted-" in name]


def test_errors_have_their_exit_codes(tmp_path: Path, registry: FaultyRegistry) -> None:
    with Daemon(tmp_path / "d") as daemon:
        target = tmp_path / "target"
        target.mkdir()
        assert daemon.run("mount", f"docker://{registry.address}/sample:none", str(target)).returncode == 10
        assert daemon.run("mount", "docker://127.0.0.1:1/sample:1", str(target)).returncode == 11
        assert daemon.run("mount", _image(registry), str(tmp_path / "missing")).returncode == 2
        assert daemon.run("umount", str(target)).returncode == 10
        assert daemon.run("remove", "nothing").returncode == 10
        assert daemon.run("mount", "docker://UPPER/case", str(target)).returncode == 2


def test_errors_say_what_to_do(daemon: Daemon, registry: FaultyRegistry) -> None:
    image = _image(registry)
    unknown = daemon.run("prefetch", image)
    assert (unknown.returncode, unknown.stderr.splitlines()[1]) == (10, f"hint: erofs-loader add {image}")
    target = daemon.mount(image)
    busy = daemon.run("mount", image, str(target), "--domain", "another")
    hint = f"hint: unmount it first: erofs-loader umount {target}"
    assert (busy.returncode, busy.stderr.splitlines()[1:]) == (14, [hint])
