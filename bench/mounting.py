"""R12: from the command to the first `ls` of an image with 100,000 files, over a link of 1 Gbit/s and 20 ms.

The daemon runs, and knows the registry, as on a node that has mounted from it before: it has seen another image there.
Of this image nothing is here. The image is named by its artifact's tag, as where the source image was not kept, and by
the tag of its source.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from bench.demo import run
from bench.link import Link
from bench.measure import Row, Sample
from bench.node import BUILDER, LOADER, Node, drop_caches
from tests.support.registry import docker_registry

FILES, IN_EACH = 100_000, 500
RATE, RTT = 1e9 / 8, 0.02
GOAL = 3 * RTT + 0.15
NAMES = {"1": "source", "1-erofs": "artifact"}
TRIPS = {"1": 3, "1-erofs": 2}  # the source's manifest leads to the artifact's; the metadata are the last one


def rows(runs: int) -> list[Row]:
    """One row for each way to name the image."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with docker_registry(scratch / "registry") as registry:
            _publish(registry, "other", scratch, 10)
            _publish(registry, "many", scratch, FILES)
            samples = {tag: Sample() for tag in NAMES}
            with Link(registry, RATE, RTT) as link:
                for number in range(runs):
                    for tag, sample in samples.items():
                        sample.add(_first_listing(link, scratch / f"{tag}-{number}", tag) * 1e3)
    return [_row(tag, sample) for tag, sample in samples.items()]


def _row(tag: str, sample: Sample) -> Row:
    return Row(
        "R12", f"mount to first ls, 100,000 files, by its {NAMES[tag]}, 1 Gbit/s, 20 ms", sample.text("ms", 0), "",
        sample.median, GOAL * 1e3, larger=False, unit=" ms", samples={"ours": sample.values},
        limit=f"{TRIPS[tag]} round trips take {TRIPS[tag] * RTT * 1e3:.0f} ms",
        commands=[f"erofs-loader mount docker://REGISTRY/many:{tag} $W/mnt; ls $W/mnt"],
    )  # fmt: skip


def _publish(registry: str, repository: str, scratch: Path, files: int) -> None:
    """An image of small files, as a source and as its artifact."""
    tree = scratch / repository
    for start in range(0, files, IN_EACH):
        directory = tree / f"d{start // IN_EACH:03}"
        directory.mkdir(parents=True)
        for number in range(start, min(start + IN_EACH, files)):
            (directory / f"file{number:06}").write_text(f"{number}\n")
    layout = scratch / f"{repository}.oci"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:1")
    run("umoci", "insert", "--image", f"{layout}:1", tree, "/")
    subprocess.run(["rm", "-rf", tree], check=True)
    source = f"docker://{registry}/{repository}:1"
    run("skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:1", source)
    run(BUILDER, "convert", "--insecure", source, f"{source}-erofs")


def _first_listing(link: Link, place: Path, tag: str) -> float:
    """Seconds from the command to the end of `ls`."""
    with Node(place, "--insecure") as node:
        node.mount(f"docker://{link.address}/other:1", place / "other")
        target = place / "mnt"
        target.mkdir()
        drop_caches()
        programs: list[list[str | Path]] = [[LOADER, "--version"], ["ls", place]]
        for program in programs:  # they themselves are warm
            subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        node.run("mount", f"docker://{link.address}/many:{tag}", target)
        subprocess.run(["ls", target], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - begin
        for mounted in (target, place / "other"):
            node.umount(mounted)
    return seconds
