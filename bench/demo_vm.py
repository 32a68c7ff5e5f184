"""The demo where this kernel has no plane: the node is a virtual machine, everything else the same.

The guest is emulated, so its seconds are those of a slower machine; its bytes are the same.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
IMAGE = "debian:12"


class Around:
    """What is around a guest: a registry at `address` that has the image and its artifact."""

    def __init__(self, host: ModuleType, side: Any, kernel: Any) -> None:
        self._host, self._side, self._kernel = host, side, kernel
        self.address: str = side.registry.address

    def play(self, link: Link, **task: Any) -> dict[str, Any]:
        """The demo in a guest that sees the registry through `link`; its facts. SystemExit if it does not pass."""
        scenario: Any = importlib.import_module("scenarios._demo")

        def prepare(own: Any) -> dict[str, Any]:
            own.handlers["link_reset"] = lambda: list(link.reset())
            own.handlers["link_bytes"] = lambda: sum(link.counters()[:2])
            return {"reference": f"docker://{seen(link.address)}/{IMAGE}", **task}

        scenario.host = prepare
        for earlier in self._side.folder.glob("*-_demo"):  # a guest's disk and output, of which there is one a name
            shutil.rmtree(earlier)
        result = self._host.play(self._side, scenario, self._host.Cell(self._kernel, PLANE, FORM))
        if result.outcome != "passed":
            raise SystemExit(f"the virtual machine {result.outcome}: {result.message}")
        facts: dict[str, Any] = result.facts
        return facts


def seen(address: str) -> str:
    """What a guest has to say for a port of our loopback."""
    return f"10.0.2.2:{address.rpartition(':')[2]}"


@contextmanager
def around_guest(scratch: Path) -> Iterator[Around]:
    """For guests, with `scratch` as the place for state (they must see it: not below /tmp)."""
    sys.path.insert(0, str(VM_TESTS))
    build, host, netns, table = (importlib.import_module(f"rig.{name}") for name in ("build", "host", "netns", "table"))
    kernel = build.obtain(table.load()[KERNEL])
    netns.enter()  # from here on nothing outside is reached
    side = host.Host(host.Shared(scratch / "vm"))
    try:
        around = Around(host, side, kernel)
        source = f"docker://{around.address}/{IMAGE}"
        push(catalog.image("debian") / "oci", f"{around.address}/{IMAGE}")
        run(BUILDER, "convert", "--insecure", source, f"{source}-erofs")
        yield around
    finally:
        side.close()


def demo(rate: float, rtt: float, scratch: Path) -> None:
    """Everything, with `scratch` as the place for state."""
    with around_guest(scratch) as around:
        say(
            f"Linux {KERNEL} under QEMU, {PLANE} plane, {FORM} form, a link of {rate / 1e6:g} MB/s and {rtt * 1e3:g} ms"
        )
        with Link(around.address, rate, rtt) as link:
            facts = around.play(link)
            lazy = Way("mount, start (guest)", facts["fetched"], facts["ready"], facts["output"])
            full = full_pull(link, scratch / "full", IMAGE)
    unpacked = file_bytes(scratch / "full/bundle/rootfs")
    print("\n" + report([full, lazy], unpacked, compressed_size(catalog.image("debian") / "oci")))


def main() -> None:
    parser = argparse.ArgumentParser(description="the demo with a virtual machine as the node")
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second (3e6)")
    parser.add_argument("--rtt", type=float, default=0.02, help="round-trip time in seconds (0.02)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="erofs-demo-", dir="/var/tmp") as scratch:
        demo(options.rate, options.rtt, Path(scratch))


if __name__ == "__main__":
    main()
