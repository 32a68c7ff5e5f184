"""What others need from their command to the first output of the application, over the same link and from nothing."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.demo import run
from bench.link import Link
from bench.measure import shown
from bench.node import drop_caches
from bench.peers import NydusBuilt, nydus2_command, nydus3_command, nydus_builds, push_blob
from bench.peers_containerd import Snapshotter, SnapshotterNode, commands, publish_all
from bench.workload import start_application

REPOSITORY = "debian"  # of Nydus' blobs
_NYDUS_COMMANDS = {"nydus2": nydus2_command, "nydus3": nydus3_command}


class Peer(NamedTuple):
    """A peer whose image lies in the registry; `start` has state below a directory, and returns seconds and bytes."""

    title: str
    commands: list[str]
    start: Callable[[Link, Path], tuple[float, int]]


def prepare(scratch: Path, registry: str, layout: Path) -> tuple[dict[str, Peer], list[str]]:
    """Build and publish the image for each peer that is here; and what is said of those that are not."""
    peers: dict[str, Peer] = {}
    notes: list[str] = []
    run("umoci", "unpack", "--image", f"{layout}:latest", scratch / "tree")
    for built in nydus_builds(scratch / "tree/rootfs", scratch, notes):
        push_blob(registry, REPOSITORY, built.image.blob.read_bytes())
        bootstrap = push_blob(registry, REPOSITORY, built.image.packed_bootstrap())
        line = shown(_NYDUS_COMMANDS[built.name](Path("$W/bootstrap"), Path("$W")))
        peers[built.name] = Peer(built.title, [line], partial(_nydus_start, built, bootstrap))
    shutil.rmtree(scratch / "tree")
    for snapshotter in publish_all(layout, registry, scratch, notes):
        peers[snapshotter.name] = Peer(
            snapshotter.title, commands(snapshotter), partial(_snapshotter_start, snapshotter)
        )
    return peers, notes


def _nydus_start(built: NydusBuilt, bootstrap: str, link: Link, directory: Path) -> tuple[float, int]:
    """Fetch the bootstrap, mount, start."""
    directory.mkdir()
    drop_caches()
    link.reset()
    begin = time.monotonic()
    url = f"http://{link.address}/v2/{REPOSITORY}/blobs/{bootstrap}"
    subprocess.run(f"curl -fsS {url} | gunzip > {directory}/bootstrap", shell=True, check=True)
    with built.mount(directory / "bootstrap", link.address, REPOSITORY, directory / "node") as node:
        start_application(node.mount_point)
        return time.monotonic() - begin, sum(link.counters()[:2])


def _snapshotter_start(snapshotter: Snapshotter, link: Link, directory: Path) -> tuple[float, int]:
    """Pull lazily, mount, start; both daemons run before, as ours does."""
    with SnapshotterNode(snapshotter, directory) as node:
        drop_caches()
        link.reset()
        begin = time.monotonic()
        node.mount(link.address)
        start_application(node.mount_point)
        return time.monotonic() - begin, sum(link.counters()[:2])
