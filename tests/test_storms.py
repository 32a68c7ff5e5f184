"""Many at once: what several readers want is fetched once, over a bounded number of connections."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, convert, make_files, make_tree, result, start_reader
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]
IMAGES, MOUNTS = 8, 64
CONNECTIONS = 8  # of the daemon, by default
THREADS = """
import hashlib, sys, threading
barrier, seen = threading.Barrier(200), []
def read():
    with open(sys.argv[1], "rb", buffering=0) as stream:
        barrier.wait()
        seen.append(hashlib.sha256(stream.read()).hexdigest())
threads = [threading.Thread(target=read) for _ in range(200)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(seen), *set(seen))
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyRegistry, list[dict[str, str]]]]:
    directory = tmp_path_factory.mktemp("storm")
    digests = []
    with docker_registry(directory / "registry") as address, FaultyRegistry(address) as proxy:
        for number in range(IMAGES):
            digests.append(make_tree(directory / f"tree{number}", number))
            convert(directory / f"tree{number}", f"docker://{address}/sample:{number}")
        digests.append(make_files(directory / "one", 1, 200_000))
        convert(directory / "one", f"docker://{address}/one:1")
        yield proxy, digests


@pytest.mark.parametrize("form", ["encoded", "decoded"])
def test_many_starts_fetch_each_frame_once(
    tmp_path: Path, registry: tuple[FaultyRegistry, list[dict[str, str]]], form: str
) -> None:
    proxy, digests = registry
    proxy.ranges.clear()
    proxy.most_at_once = proxy.connections = 0
    with Daemon(tmp_path / "d", "--form", form) as daemon:
        image = f"docker://{proxy.address}/sample:"
        targets = [daemon.mount(f"{image}{number % IMAGES}", f"mnt{number}") for number in range(MOUNTS)]
        proxy.delay = 0.02
        readers = [start_reader(target, number) for number, target in enumerate(targets)]
        for number, reader in enumerate(readers):
            assert result(reader) == digests[number % IMAGES]
        proxy.delay = 0.0
        assert proxy.overlaps() == []
        counters = daemon.counters()
        assert counters["requests_failed"] == counters["corrupt_frames"] == 0
        blobs = {blob for blob, _, _ in proxy.ranges}
        assert len(blobs) == IMAGES
        fetched = sum(last - first + 1 for _, first, last in proxy.ranges)
        stored = daemon.command("stats")["cache"]["allocated_bytes"]
        assert 0 < fetched <= stored  # no frame twice: what was fetched is what lies there, or less than it decodes to
        assert proxy.most_at_once <= CONNECTIONS
        assert proxy.connections <= IMAGES + 2 * CONNECTIONS + MOUNTS  # documents: at most one for each mount


def test_sixty_four_images_start_together(tmp_path: Path) -> None:
    digests = []
    with docker_registry(tmp_path / "registry") as address, FaultyRegistry(address) as proxy:
        trees = [tmp_path / f"tree{number}" for number in range(MOUNTS)]
        digests = [make_files(tree, 2 + number, 20_000) for number, tree in enumerate(trees)]
        with ThreadPoolExecutor(4) as pool:
            targets = [f"docker://{address}/image{number}:1" for number in range(MOUNTS)]
            list(pool.map(convert, trees, targets))
        with Daemon(tmp_path / "d") as daemon:
            images = [f"docker://{proxy.address}/image{number}:1" for number in range(MOUNTS)]
            mounts = [daemon.mount(image, f"mnt{number}") for number, image in enumerate(images)]
            proxy.delay = 0.02
            readers = [start_reader(target, number) for number, target in enumerate(mounts)]
            assert [result(reader) for reader in readers] == digests
            assert proxy.overlaps() == []
            assert daemon.counters()["requests_failed"] == 0
            assert len({blob for blob, _, _ in proxy.ranges}) == MOUNTS
            assert proxy.most_at_once <= CONNECTIONS


def test_two_hundred_threads_on_one_cold_frame(
    tmp_path: Path, registry: tuple[FaultyRegistry, list[dict[str, str]]]
) -> None:
    proxy, digests = registry
    proxy.ranges.clear()
    with Daemon(tmp_path / "d") as daemon:
        target = daemon.mount(f"docker://{proxy.address}/one:1")
        proxy.delay = 0.3
        done = subprocess.run([sys.executable, "-c", THREADS, str(target / "000")], capture_output=True, text=True)
        proxy.delay = 0.0
        assert done.stdout.split() == ["200", digests[-1]["000"]], done.stderr
        assert proxy.overlaps() == []
        assert daemon.counters()["requests_failed"] == 0
