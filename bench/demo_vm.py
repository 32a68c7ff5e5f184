"""The demo where this kernel has no plane: the node is a virtual machine, everything else the same.

The guest is emulated, so its seconds are those of a slower machine; its bytes are the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.demo import Way, compressed_size, file_bytes, full_pull, report, run, say
from bench.link import Link
from bench.node import BUILDER
from tests.images import catalog
from tests.images.layout import push

VM_TESTS = Path(__file__).resolve().parent.parent / "vm-tests"
KERNEL, PLANE, FORM = "trixie-backports", "fanotify", "encoded"


def demo(rate: float, rtt: float, scratch: Path) -> None:
    """Everything, with `scratch` as the place for state (the guest must see it: not below /tmp)."""
    sys.path.insert(0, str(VM_TESTS))
    build, host, netns, table = (importlib.import_module(f"rig.{name}") for name in ("build", "host", "netns", "table"))
    layout = catalog.image("debian") / "oci"
    image = build.obtain(table.load()[KERNEL])
    netns.enter()  # from here on nothing outside is reached
    side = host.Host(host.Shared(scratch / "vm"))
    try:
        address = side.registry.address
        push(layout, f"{address}/debian:12")
        run(BUILDER, "convert", "--insecure", f"docker://{address}/debian:12", f"docker://{address}/debian:12-erofs")
        say(
            f"Linux {KERNEL} under QEMU, {PLANE} plane, {FORM} form, a link of {rate / 1e6:g} MB/s and {rtt * 1e3:g} ms"
        )
        with Link(address, rate, rtt) as link:
            lazy = _in_guest(host, side, host.Cell(image, PLANE, FORM), link)
            full = full_pull(link, scratch / "full", "debian:12")
    finally:
        side.close()
    print("\n" + report([full, lazy], file_bytes(scratch / "full/bundle/rootfs"), compressed_size(layout)))


def _in_guest(host: ModuleType, side: Any, cell: Any, link: Link) -> Way:
    scenario: Any = importlib.import_module("scenarios._demo")
    seen = f"docker://10.0.2.2:{link.address.rpartition(':')[2]}/debian:12"

    def prepare(own_side: Any) -> dict[str, Any]:
        own_side.handlers |= {"link_reset": lambda: list(link.reset()), "link_bytes": lambda: sum(link.counters()[:2])}
        return {"reference": seen}

    scenario.host = prepare
    result = host.play(side, scenario, cell)
    if result.outcome != "passed":
        raise SystemExit(f"the virtual machine {result.outcome}: {result.message}")
    return Way("mount, start (guest)", result.facts["fetched"], result.facts["ready"], result.facts["output"])


def main() -> None:
    parser = argparse.ArgumentParser(description="the demo with a virtual machine as the node")
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second (3e6)")
    parser.add_argument("--rtt", type=float, default=0.02, help="round-trip time in seconds (0.02)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="erofs-demo-", dir="/var/tmp") as scratch:
        demo(options.rate, options.rtt, Path(scratch))


if __name__ == "__main__":
    main()
