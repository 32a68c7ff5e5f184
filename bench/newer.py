"""R15: bytes and seconds until the first output beside mount.erofs, in a virtual machine.

It needs a kernel that tells of reads of metadata, Linux 7.1 or later.

python -m bench.newer --runs 5    prints what was seen as JSON; in a process of its own, with a network of its own

The guest is emulated, so its seconds are those of a slow machine, and of both; its bytes are as anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import peers_erofs
from bench.demo import compressed_size, run
from bench.demo_vm import VM_TESTS, around_guest, seen
from bench.link import Link
from bench.measure import Row, Sample, ratios, shown
from bench.peers import MissingPeer
from tests.images import catalog

RELEASE = "Linux 7.3"  # of demo_vm.KERNEL
RATE, RTT = 3e6, 0.02


def rows(runs: int) -> list[Row]:
    """A start of each in a guest that was just booted, in turn, `runs` times."""
    try:
        peers_erofs.program()
    except MissingPeer as missing:
        return [Row("R15", f"a start, {RELEASE} in a virtual machine", "-", str(missing), 0, 0, larger=True)]
    words = [sys.executable, "-m", "bench.newer", "--runs", str(runs)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=VM_TESTS.parent)
    return _rows(json.loads(done.stdout.splitlines()[-1]))


def _rows(facts: list[dict[str, Any]]) -> list[Row]:
    compressed = compressed_size(catalog.image("debian") / "oci")
    share, theirs = (Sample([each[of + "fetched"] / compressed * 100 for each in facts]) for of in ("", "peer "))
    seconds, their_seconds = (Sample([each[of + "output"] for each in facts]) for of in ("", "peer "))
    title, where = peers_erofs.TITLE, f"{RELEASE} in a virtual machine"
    return [
        Row("R15", f"bytes until the start / compressed image, {where}", share.text("%", 2),
            f"{title} {theirs.text('%', 2)}", share.median, 8.5, larger=False, unit=" %",
            peers={title: theirs.median}, samples={"ours": share.values, "peer": theirs.values},
            commands=[shown([*peers_erofs.command("LINK", "DIGEST"), "$W/mnt"])]),
        Row("R15", f"start with {title} / with ours, {where}", seconds.text("s"),
            f"{title} {their_seconds.text('s')}", ratios(their_seconds, seconds).median, 1, larger=True, unit="×",
            peers={title: 1.0}, samples={"ours": seconds.values, "peer": their_seconds.values}),
    ]  # fmt: skip


def measure(runs: int, scratch: Path) -> list[dict[str, Any]]:
    """What each guest saw; `scratch` must be where they see it: not below /tmp."""
    with around_guest(scratch) as around:
        run("umoci", "unpack", "--image", f"{catalog.image('debian') / 'oci'}:latest", scratch / "tree")
        blob = peers_erofs.publish(scratch / "tree/rootfs", around.address, scratch)
        with Link(around.address, RATE, RTT) as link:
            return [around.play(link, peer=peers_erofs.command(seen(link.address), blob)) for _ in range(runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="a start by mount.erofs and by ours, in a virtual machine")
    parser.add_argument("--runs", type=int, default=5, help="guests (5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="erofs-bench-", dir="/var/tmp") as scratch:
        print(json.dumps(measure(options.runs, Path(scratch))))


if __name__ == "__main__":
    main()
