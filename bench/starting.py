"""R1, R2, R3: bytes and seconds until the first output over a link, nothing cached: without a trace, with one, rebuilt.

The trace is of the pages that one start touched of the same image in a repository of its own, published as
`erofs-loader trace` does it; the rebuilt artifact, in a third one, is made from that.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.demo import compressed_size, full_pull, lazy_start, run
from bench.link import Link
from bench.measure import Row, Sample
from bench.node import BUILDER, Node
from bench.starting_peers import Peer, prepare
from bench.workload import command
from tests.images import catalog
from tests.images.layout import push
from tests.support.registry import docker_registry

RATE, RTT = 3e6, 0.02
TRACE_LINKS = (("25 Mbit/s, 20 ms", 25e6 / 8, 0.02, 2), ("1 Gbit/s, 1 ms", 1e9 / 8, 0.001, 1))  # R3, with its goals
PLAIN, TRACED, REBUILT = "debian:12", "traced/debian:12", "rebuilt/debian:12"


def rows(runs: int) -> list[Row]:
    """Pull and unpack, ours, and the peers, in turn."""
    layout = catalog.image("debian") / "oci"
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with docker_registry(scratch / "registry") as registry:
            for name in (PLAIN, TRACED):
                _publish(layout, f"{registry}/{name}")
            _publish_trace(scratch / "tracing", f"docker://{registry}/{TRACED}")
            _publish(layout, f"{registry}/{REBUILT}", "--trace", f"docker://{registry}/{TRACED}")
            peers, notes = prepare(scratch, registry, layout)
            with Link(registry, RATE, RTT) as link:
                samples = _measure(runs, link, scratch, peers)
            trace_rows = [row for each in TRACE_LINKS for row in _trace_rows(runs, registry, scratch, *each)]
    return [*_rows(samples, peers, notes, compressed_size(layout)), *trace_rows]


def _publish(layout: Path, name: str, *options: str) -> None:
    """Push the image, and its artifact beside it."""
    push(layout, name)
    run(BUILDER, "convert", "--insecure", *options, f"docker://{name}", f"docker://{name}-erofs")


def _publish_trace(scratch: Path, image: str) -> None:
    """Start the application once, and publish what that touched."""
    target = scratch / "mnt"
    with Node(scratch, "--insecure") as node:
        target.mkdir()
        node.run("mount", "--form", "decoded", image, target)
        try:
            node.run("trace", "--insecure", image, "--", *command(target))
        finally:
            node.umount(target)


def _trace_rows(runs: int, registry: str, scratch: Path, name: str, rate: float, rtt: float, goal: float) -> list[Row]:
    """R3: the start without a trace / with it, the image as it was and rebuilt, in turn."""
    samples = {PLAIN: Sample(), TRACED: Sample(), REBUILT: Sample()}
    with Link(registry, rate, rtt) as link:
        for number in range(runs):
            for image, sample in samples.items():
                place = scratch / f"trace-{number}"
                sample.add(lazy_start(link, place, image, "--insecure").output)
                shutil.rmtree(place)
    plain = samples[PLAIN]
    rows = []
    for image, title in ((TRACED, "with a trace"), (REBUILT, "with a layout rebuilt from it")):
        sample = samples[image]
        ratio = Sample([one / other for one, other in zip(plain.values, sample.values, strict=True)])
        rows.append(
            Row("R3", f"start without / {title}, {name}", sample.text("s"), f"without {plain.text('s')}",
                ratio.median, goal, larger=True, unit="×",
                samples={"with": sample.values, "without": plain.values})
        )  # fmt: skip
    return rows


def _measure(runs: int, link: Link, scratch: Path, peers: dict[str, Peer]) -> dict[str, tuple[Sample, Sample]]:
    """Seconds and bytes of each way, in turn, `runs` times."""
    samples = {name: (Sample(), Sample()) for name in ("full", "ours", "traced", "rebuilt", *peers)}
    for number in range(runs):
        place = scratch / f"run{number}"
        place.mkdir()
        full = full_pull(link, place / "full", PLAIN)
        ours = lazy_start(link, place / "ours", PLAIN, "--insecure")
        traced = lazy_start(link, place / "traced", TRACED, "--insecure")
        rebuilt = lazy_start(link, place / "rebuilt", REBUILT, "--insecure")
        ways = {"full": full, "ours": ours, "traced": traced, "rebuilt": rebuilt}
        results = {name: (way.output, way.fetched) for name, way in ways.items()}
        results |= {name: peer.start(link, place / name) for name, peer in peers.items()}
        for name, (seconds, fetched) in results.items():
            samples[name][0].add(seconds)
            samples[name][1].add(fetched)
        shutil.rmtree(place)
    return samples


def _rows(
    samples: dict[str, tuple[Sample, Sample]], peers: dict[str, Peer], notes: list[str], compressed: int
) -> list[Row]:
    titles = {name: peer.title for name, peer in peers.items()}
    share = {
        name: Sample([value / compressed * 100 for value in fetched.values]) for name, (_, fetched) in samples.items()
    }
    seconds = {name: sample for name, (sample, _) in samples.items()}
    full = seconds["full"].median
    bytes_of_peers = [f"{title} {share[name].text('%')}" for name, title in titles.items()]
    time_of_peers = [
        f"{title} {seconds[name].text('s')}, {full / seconds[name].median:.1f}×" for name, title in titles.items()
    ]
    raw = {f"{name} seconds": sample.values for name, sample in seconds.items()}
    raw |= {f"{name} bytes": fetched.values for name, (_, fetched) in samples.items()}
    commands = [
        f"skopeo copy docker://LINK/{PLAIN} oci:$W/oci:latest && umoci unpack --image $W/oci:latest $W/bundle",
        *(line for peer in peers.values() for line in peer.commands),
    ]
    peer_shares = {title: share[name].median for name, title in titles.items()}
    peer_times = {title: full / seconds[name].median for name, title in titles.items()}
    links = {name: f"the link alone needs {samples[name][1].median / RATE:.1f} s for what is fetched"
             for name in ("ours", "traced", "rebuilt")}  # fmt: skip
    return [
        Row("R1", "bytes until the start / compressed image", share["ours"].text("%"),
            "; ".join([*bytes_of_peers, *notes]), share["ours"].median, 8.5, larger=False, unit=" %", samples=raw,
            peers=peer_shares, commands=commands),
        Row("R2", f"full pull ({full:.1f} s) / lazy start", seconds["ours"].text("s"),
            "; ".join([*time_of_peers, *notes]), full / seconds["ours"].median, 9, larger=True, unit="×", samples=raw,
            peers=peer_times, limit=links["ours"]),
        Row("R1", "the same with a trace, image not rebuilt", share["traced"].text("%"),
            "", share["traced"].median, 7.5, larger=False, unit=" %", peers=peer_shares),
        Row("R2", "the same with a trace", seconds["traced"].text("s"),
            "", full / seconds["traced"].median, 12, larger=True, unit="×", peers=peer_times,
            limit=links["traced"]),
        Row("R1", "the same with a layout rebuilt from the trace", share["rebuilt"].text("%"),
            "", share["rebuilt"].median, 4.5, larger=False, unit=" %", peers=peer_shares),
        Row("R2", "the same with a layout rebuilt from the trace", seconds["rebuilt"].text("s"),
            "", full / seconds["rebuilt"].median, 20, larger=True, unit="×", peers=peer_times,
            limit=links["rebuilt"]),
    ]  # fmt: skip
