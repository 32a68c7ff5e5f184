"""R11: a thousand images on one node, and one image started 64 times at once on an empty cache."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.demo import run
from bench.link import Link
from bench.measure import Row, Sample, shown
from bench.node import BUILDER, Node, drop_caches, memory
from bench.peers import MissingPeer, NydusImage, PeerMount, nydus2_mount, push_blob
from bench.workload import start_application
from loader.cli.loader_client import Client
from loader.convert.convert import Request, convert
from loader.registry.config import RegistryConfig
from tests.images import catalog
from tests.images.layout import push
from tests.support.registry import docker_registry

IMAGES, FILES, CLIENTS = 1000, 40, 4
PEERS = 40
STARTS = 64
RATE, RTT = 1e9 / 8, 0.001
IMAGE = "debian:12"


def rows(runs: int) -> list[Row]:
    """The thousand, then the 64."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with docker_registry(scratch / "registry") as registry:
            _publish(registry, scratch / "trees")
            _forget_deleted()
            memory_of, speed, ends = _mount_all(runs, registry, scratch)
            peer = _peer(registry, scratch)
            found = [*_thousand_rows(memory_of, speed, ends, peer)]
            push(catalog.image("debian") / "oci", f"{registry}/{IMAGE}")
            image = f"docker://{registry}/{IMAGE}"
            run(BUILDER, "convert", "--insecure", image, f"{image}-erofs")
            return [*found, _starts_row(min(runs, 3), registry, scratch)]


# A thousand images


def _publish(registry: str, trees: Path) -> None:
    """Small images that share nothing, each in a repository of its own."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_publish_one, [(registry, str(trees / str(number)), number) for number in range(IMAGES)], 20)


def _publish_one(registry: str, tree: str, number: int) -> None:
    root = Path(tree)
    for file in range(FILES):
        path = root / f"usr/lib/part{file % 5}/file{file}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"image {number}, file {file}\n" * (file * 30 + 1))
    convert(Request(f"rootfs:{tree}", _name(registry, number)), RegistryConfig(insecure=True))
    shutil.rmtree(root)


def _name(registry: str, number: int) -> str:
    return f"docker://{registry}/many/{number}:1"


def _mount_all(runs: int, registry: str, scratch: Path) -> tuple[Sample, Sample, tuple[Sample, Sample]]:
    """Resident bytes an image, mounts a second, and both for the first and the last hundred."""
    memory_of, speed, first, last = Sample(), Sample(), Sample(), Sample()
    for number in range(runs):
        place = scratch / f"thousand-{number}"
        with Node(place, "--insecure") as node:
            targets = [place / f"mnt/{image}" for image in range(IMAGES)]
            for target in targets:
                target.mkdir(parents=True)
            _mount(node, [(_name(registry, 0), targets[0])])
            before = _resident(node)
            rest = [(_name(registry, image), targets[image]) for image in range(1, IMAGES)]
            os.sync()
            times = _mount(node, rest)
            speed.add(len(times) / (times[-1] - times[0]))
            first.add(100 / (times[100] - times[0]))
            last.add(100 / (times[-1] - times[-101]))
            time.sleep(1)
            memory_of.add((_resident(node) - before) / len(rest))
            node.run("stop", "--umount")
    return memory_of, speed, (first, last)


def _forget_deleted() -> None:
    """Wait until deleted files do not count any more: for a minute an ext4 without a journal passes over each of their
    inodes whenever a file is made. What is done from here on deletes none."""
    os.sync()
    time.sleep(61)


def _mount(node: Node, wanted: list[tuple[str, Path]]) -> list[float]:
    """Mount over the control socket, as a snapshotter does, some at a time; when each was done, in order."""
    client = Client(node.root / "control.sock")

    def mount(one: tuple[str, Path]) -> float:
        client.request("POST", "/v1/mounts", {"image": one[0], "target": str(one[1])})
        return time.monotonic()

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sorted([time.monotonic(), *pool.map(mount, wanted)])


def _resident(node: Node) -> int:
    return sum(memory(pid) for pid in node.processes())


def _peer(registry: str, scratch: Path) -> tuple[float, float, str] | str:
    """Nydus 2, one daemon an image: resident bytes and mounts a second; or why not."""
    tree = scratch / "peer-tree"
    for file in range(FILES):
        path = tree / f"usr/lib/part{file % 5}/file{file}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {file}\n" * (file * 30 + 1))
    try:
        image = NydusImage.build(tree, scratch / "peer")
    except MissingPeer as missing:
        return str(missing)
    push_blob(registry, "peer", image.blob.read_bytes())
    mounts: list[PeerMount] = []

    def mount(number: int) -> None:
        mounts.append(nydus2_mount(image.bootstrap, registry, "peer", scratch / f"peer-{number}"))
        mounts[-1].__enter__()

    try:
        os.sync()
        begin = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:  # as many at a time as with ours
            list(pool.map(mount, range(PEERS)))
        seconds = time.monotonic() - begin
        resident = Sample([memory(each.pid) for each in mounts])
        return resident.median, PEERS / seconds, shown(mounts[0].command, scratch)
    finally:
        for each in mounts:
            each.__exit__()


def _thousand_rows(
    memory_of: Sample, speed: Sample, ends: tuple[Sample, Sample], peer: tuple[float, float, str] | str
) -> list[Row]:
    megabytes = Sample([value / 1e6 for value in memory_of.values])
    figures: tuple[dict[str, float], dict[str, float]] = ({}, {})
    texts, commands = (str(peer), str(peer)), []
    if not isinstance(peer, str):
        figures = ({"Nydus 2": peer[0] / 1e6}, {"Nydus 2": peer[1]})
        texts = (f"Nydus 2, a daemon an image: {peer[0] / 1e6:.1f} MB", f"Nydus 2 {peer[1]:.0f} a second")
        commands = [peer[2]]
    first, last = ends
    return [
        Row("R11", f"{IMAGES} images mounted: resident memory an image", megabytes.text("MB", 3), texts[0],
            megabytes.median, 1, larger=False, unit=" MB", samples={"bytes": memory_of.values}, peers=figures[0],
            commands=commands, limit="growth from 1 to 1,000 images over all processes of the daemon"),
        Row("R11", f"mounts a second, {IMAGES} images of {IMAGES} repositories", speed.text("/s"), texts[1],
            speed.median, 50, larger=True, unit="/s", samples={"mounts": speed.values}, peers=figures[1],
            limit=f"first hundred {first.median:.0f}/s, last hundred {last.median:.0f}/s; one request each, for a "
            "manifest that has the small image's metadata in it; the peer's bootstrap is a file on the node"),
    ]  # fmt: skip


# 64 starts


def _starts_row(runs: int, registry: str, scratch: Path) -> Row:
    one, many, seconds = Sample(), Sample(), Sample()
    with Link(registry, RATE, RTT) as link:
        for number in range(runs):
            one.add(_start(1, link, scratch / f"one-{number}")[0])
            count, elapsed = _start(STARTS, link, scratch / f"many-{number}")
            many.add(count)
            seconds.add(elapsed)
    share = Sample([all_of / alone for all_of, alone in zip(many.values, one.values, strict=True)])
    return Row(
        "R11", f"registry bytes of {STARTS} cold starts at once, each from its own mount / of one",
        f"{many.median / 1e6:.2f} MB, {seconds.text('s')}", f"one start {one.median / 1e6:.2f} MB", share.median, 1.05,
        larger=False, unit="×", samples={"one": one.values, "many": many.values},
        limit="1.0× rounded: what is guessed ahead differs from start to start",
    )  # fmt: skip


def _start(count: int, link: Link, place: Path) -> tuple[int, float]:
    """Bytes and seconds of so many mounts and starts at once, with nothing cached."""
    with Node(place, "--insecure") as node, ThreadPoolExecutor(count) as pool:
        targets = [place / f"mnt/{number}" for number in range(count)]
        drop_caches()
        link.reset()
        begin = time.monotonic()
        list(pool.map(lambda target: node.mount(f"docker://{link.address}/{IMAGE}", target), targets))
        list(pool.map(start_application, targets))
        seconds = time.monotonic() - begin
        counted = _settled(link)
        node.run("stop", "--umount")
    shutil.rmtree(place)
    return counted, seconds


def _settled(link: Link) -> int:
    """What went over the link once nothing goes over it any more."""
    before, now = -1, sum(link.counters()[:2])
    while now != before:
        time.sleep(0.5)
        before, now = now, sum(link.counters()[:2])
    return now
