"""R1 and R2: bytes and seconds until the application's first output, over a slow link, nothing cached."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from bench.demo import compressed_size, full_pull, lazy_start, run
from bench.link import Link
from bench.measure import Row, Sample
from bench.node import BUILDER, drop_caches
from bench.peers import MissingPeer, Nydusd, NydusImage, push_blob
from bench.workload import start_application
from tests.images import catalog
from tests.images.layout import push
from tests.support.registry import docker_registry

RATE, RTT = 3e6, 0.02


def rows(runs: int) -> list[Row]:
    """Pull and unpack, ours, and Nydus 2, in turn."""
    layout = catalog.image("debian") / "oci"
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with docker_registry(scratch / "registry") as registry:
            push(layout, f"{registry}/debian:12")
            run(BUILDER, "convert", "--insecure", f"docker://{registry}/debian:12", f"docker://{registry}/debian:erofs")
            nydus, note = _prepare_nydus(scratch, registry, layout)
            with Link(registry, RATE, RTT) as link:
                return _measure(runs, link, scratch, nydus, note, compressed_size(layout))


def _prepare_nydus(scratch: Path, registry: str, layout: Path) -> tuple[NydusImage | None, str]:
    run("umoci", "unpack", "--image", f"{layout}:latest", scratch / "tree")
    try:
        image = NydusImage.build(scratch / "tree/rootfs", scratch / "nydus")
    except MissingPeer as missing:
        return None, str(missing)
    finally:
        shutil.rmtree(scratch / "tree")
    push_blob(registry, "debian", image.blob.read_bytes())
    image.bootstrap_digest = push_blob(registry, "debian", image.packed_bootstrap())
    return image, ""


def _nydus_start(link: Link, image: NydusImage, directory: Path) -> tuple[float, int]:
    """Fetch the bootstrap, mount, start; returns seconds and bytes."""
    directory.mkdir()
    drop_caches()
    link.reset()
    begin = time.monotonic()
    url = f"http://{link.address}/v2/debian/blobs/{image.bootstrap_digest}"
    subprocess.run(f"curl -fsS {url} | gunzip > {directory}/bootstrap", shell=True, check=True)
    with Nydusd(directory / "bootstrap", link.address, "debian", directory / "node") as node:
        start_application(node.mount_point)
        return time.monotonic() - begin, sum(link.counters()[:2])


def _measure(runs: int, link: Link, scratch: Path, nydus: NydusImage | None, note: str, compressed: int) -> list[Row]:
    names = ("full", "ours", "nydus")
    seconds, fetched = {name: Sample() for name in names}, {name: Sample() for name in names}
    for number in range(runs):
        place = scratch / f"run{number}"
        place.mkdir()
        for name, way in (
            ("full", full_pull(link, place / "full", "debian:12")),
            ("ours", lazy_start(link, place / "ours", "debian:12", "--insecure")),
        ):
            seconds[name].add(way.output)
            fetched[name].add(way.fetched)
        if nydus:
            spent, count = _nydus_start(link, nydus, place / "nydus")
            seconds["nydus"].add(spent)
            fetched["nydus"].add(count)
        shutil.rmtree(place)
    return _rows(seconds, fetched, compressed, note)


def _rows(seconds: dict[str, Sample], fetched: dict[str, Sample], compressed: int, note: str) -> list[Row]:
    share = {name: Sample([value / compressed * 100 for value in sample.values]) for name, sample in fetched.items()}
    full = seconds["full"].median
    has_peer = bool(seconds["nydus"].values)
    peer = f"Nydus 2 {share['nydus'].text('%')}" if has_peer else note
    factor = f"Nydus 2 {seconds['nydus'].text('s')}, {full / seconds['nydus'].median:.1f}×" if has_peer else note
    raw = {f"{name} seconds": sample.values for name, sample in seconds.items()}
    raw |= {f"{name} bytes": sample.values for name, sample in fetched.items()}
    return [
        Row("R1", "bytes until the start / compressed image", share["ours"].text("%"), peer, share["ours"].median, 8.5,
            larger=False, unit=" %", samples=raw),
        Row("R2", f"full pull ({full:.1f} s) / lazy start", seconds["ours"].text("s"), factor,
            full / seconds["ours"].median, 9, larger=True, unit="×", samples=raw),
    ]  # fmt: skip
