"""R15: bytes and seconds until the first output beside mount.erofs, in a virtual machine.

It needs a kernel that tells of reads of metadata, Linux 7.1 or later.

python -m bench.newer    prints what was seen as JSON; in a process of its own, for that has a network of its own

The guest is emulated, so its seconds are those of a slow machine, and of both; its bytes are as anywhere.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import peers_erofs
from bench.demo import compressed_size, run
from bench.link import Link
from bench.measure import Row
from bench.node import BUILDER
from bench.peers import MissingPeer
from tests.images import catalog
from tests.images.layout import push

KERNEL, RELEASE = "trixie-backports", "Linux 7.3"
RATE, RTT = 3e6, 0.02
VM_TESTS = Path(__file__).resolve().parent.parent / "vm-tests"


def rows(runs: int) -> list[Row]:
    """One start of each, whatever `runs`: bytes hardly differ, and seconds are an emulator's."""
    try:
        peers_erofs.mount_erofs_program()
    except MissingPeer as missing:
        return [
            Row("R15", f"a start, {RELEASE} in a virtual machine", "-", str(missing), 0, 0, larger=True)
        ]  # fmt: skip
    words = [sys.executable, "-m", "bench.newer"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=VM_TESTS.parent)
    return _rows(json.loads(done.stdout.splitlines()[-1]))


def _rows(seen: dict[str, Any]) -> list[Row]:
    compressed = compressed_size(catalog.image("debian") / "oci")
    share = {name: seen[f"{name} bytes"] / compressed * 100 for name in ("ours", "peer")}
    seconds = {name: seen[f"{name} seconds"] for name in ("ours", "peer")}
    raw = {name: [float(value)] for name, value in seen.items() if name.endswith(("bytes", "seconds"))}
    title, ratio = peers_erofs.TITLE, seconds["peer"] / seconds["ours"]
    where = f"{RELEASE} in a virtual machine"
    return [
        Row("R15", f"bytes until the start / compressed image, {where}", f"{share['ours']:.2f} %",
            f"{title} {share['peer']:.2f} %", share["ours"], 8.5, larger=False, unit=" %",
            peers={title: share["peer"]}, samples=raw, commands=[seen["command"]]),
        Row("R15", f"start with {title} / with ours, {where}", f"{seconds['ours']:.1f} s",
            f"{title} {seconds['peer']:.1f} s", ratio, 1, larger=True, unit="×", peers={title: 1.0}, samples=raw),
    ]  # fmt: skip


def measure(scratch: Path) -> dict[str, Any]:
    """Both in one guest; `scratch` must be where the guest sees it: not below /tmp."""
    sys.path.insert(0, str(VM_TESTS))
    build, host, netns, table = (importlib.import_module(f"rig.{name}") for name in ("build", "host", "netns", "table"))
    scenario: Any = importlib.import_module("scenarios._peer")
    layout = catalog.image("debian") / "oci"
    image = build.obtain(table.load()[KERNEL])
    netns.enter()
    side = host.Host(host.Shared(scratch / "vm"))
    try:
        address = side.registry.address
        push(layout, f"{address}/debian:12")
        run(BUILDER, "convert", "--insecure", f"docker://{address}/debian:12", f"docker://{address}/debian:12-erofs")
        run("umoci", "unpack", "--image", f"{layout}:latest", scratch / "tree")
        blob = peers_erofs.publish(scratch / "tree/rootfs", address, scratch)
        with Link(address, RATE, RTT) as link:
            seen = f"10.0.2.2:{link.address.rpartition(':')[2]}"
            command = peers_erofs.command(seen, blob)

            def prepare(own: Any) -> dict[str, Any]:
                own.handlers |= {
                    "link_reset": lambda: list(link.reset()),
                    "link_bytes": lambda: sum(link.counters()[:2]),
                }
                return {"reference": f"docker://{seen}/debian:12", "peer": command}

            scenario.host = prepare
            result = host.play(side, scenario, host.Cell(image, "fanotify", "encoded"))
    finally:
        side.close()
    if result.outcome != "passed":
        raise SystemExit(f"the virtual machine {result.outcome}: {result.message}")
    facts: dict[str, Any] = result.facts
    return facts | {"command": " ".join(["mount.erofs", *command[1:], "$W/mnt"])}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="erofs-bench-", dir="/var/tmp") as scratch:
        print(json.dumps(measure(Path(scratch))))


if __name__ == "__main__":
    main()
