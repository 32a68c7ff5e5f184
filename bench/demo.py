"""The demo: a Debian image published, mounted over a slow link and started, against pulling and unpacking it.

python -m bench.demo [--rate BYTES] [--rtt SECONDS] [--json]

What it starts (a registry, the link, a daemon) lives below a temporary directory and is gone afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.link import Link
from bench.node import BUILDER, LOADER, Node, drop_caches
from bench.table import megabytes, render
from bench.workload import start_application
from tests.images import catalog
from tests.images.layout import Layout, push
from tests.support.registry import docker_registry

NO_PLANE = 13  # exit code: this kernel lacks support


@dataclass
class Way:
    """One way to start the application: what crossed the link, and seconds from the command to its first output."""

    name: str
    fetched: int
    ready: float  # until the image could be entered
    output: float  # until the application's first line


def say(text: str) -> None:
    """Tell what happens now; results go to stdout, this does not."""
    print(text, file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """Run a command that must succeed, quietly."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def compressed_size(layout: Path) -> int:
    """The bytes of an image's layers as they lie in the registry."""
    return sum(layer["size"] for layer in Layout(layout).manifest("latest")["layers"])


def full_pull(link: Link, scratch: Path, repository: str) -> Way:
    """Pull with skopeo, unpack with umoci, start."""
    scratch.mkdir()
    drop_caches()
    link.reset()
    begin = time.monotonic()
    layout = f"{scratch / 'oci'}:latest"
    run("skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{link.address}/{repository}", f"oci:{layout}")
    run("umoci", "unpack", "--image", layout, scratch / "bundle")
    ready = time.monotonic() - begin
    start_application(scratch / "bundle/rootfs")
    return Way("pull, unpack, start", sum(link.counters()[:2]), ready, time.monotonic() - begin)


def lazy_start(link: Link, scratch: Path, repository: str, *options: str) -> Way:
    """Mount with an empty cache, start."""
    mount_point = scratch / "mnt"
    with Node(scratch, *options) as node:
        drop_caches()
        link.reset()
        begin = time.monotonic()
        node.mount(f"docker://{link.address}/{repository}", mount_point)
        ready = time.monotonic() - begin
        try:
            start_application(mount_point)
            return Way("mount, start", sum(link.counters()[:2]), ready, time.monotonic() - begin)
        finally:
            node.umount(mount_point)


def report(ways: list[Way], unpacked: int, compressed: int) -> str:
    """The table at the end."""
    full, lazy = ways
    rows = [
        [
            way.name,
            megabytes(way.fetched),
            f"{way.fetched / compressed:.1%}",
            f"{way.ready:.1f} s",
            f"{way.output:.1f} s",
        ]
        for way in ways
    ]
    table = render(["", "fetched", "of the image", "ready", "first output"], rows)
    return (
        f"image: {megabytes(unpacked)} unpacked, {megabytes(compressed)} as compressed layers\n\n{table}\n\n"
        f"{full.output / lazy.output:.1f} times sooner, {lazy.fetched / full.fetched:.1%} of the bytes"
    )


def demo(rate: float, rtt: float, as_json: bool, scratch: Path) -> None:
    """Everything, with `scratch` as the place for state."""
    say("1. A Debian image with python3, numpy, requests and a compiler, from packages (made once, then kept)")
    layout = catalog.image("debian") / "oci"
    with docker_registry(scratch / "registry") as registry:
        say(f"2. Pushed to a docker-registry: {registry}/debian:12")
        push(layout, f"{registry}/debian:12")
        source, target = f"docker://{registry}/debian:12", f"docker://{registry}/debian:12-erofs"
        say(f"3. erofs-builder convert {source} {target}")
        begin = time.monotonic()
        run(BUILDER, "convert", "--insecure", source, target)
        say(f"   {time.monotonic() - begin:.1f} s; the source image stays as it is, the artifact refers to it")
        with Link(registry, rate, rtt) as link:
            say(f"4. From here on through a link of {rate / 1e6:g} MB/s and {rtt * 1e3:g} ms")
            say(f"5. erofs-loader mount docker://{link.address}/debian:12, then python3 from it, nothing cached")
            lazy = lazy_start(link, scratch / "node", "debian:12", "--insecure")
            say("6. The same image with skopeo copy and umoci unpack")
            full = full_pull(link, scratch / "full", "debian:12")
    unpacked = file_bytes(scratch / "full/bundle/rootfs")
    figures = {"ways": [asdict(full), asdict(lazy)], "compressed": compressed_size(layout), "unpacked": unpacked}
    if as_json:
        print(json.dumps(figures))
    else:
        print("\n" + report([full, lazy], unpacked, compressed_size(layout)))


def file_bytes(root: Path) -> int:
    """The sizes of all files below `root`, hard links once each name."""
    total = 0
    for directory, _, names in os.walk(root):
        total += sum((Path(directory) / name).lstat().st_size for name in names)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="start an image lazily and after a full pull, over a slow link")
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second (3e6)")
    parser.add_argument("--rtt", type=float, default=0.02, help="round-trip time in seconds (0.02)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("the demo mounts file systems: run it as root")
    if subprocess.run([LOADER, "probe"], stdin=subprocess.DEVNULL, capture_output=True).returncode == NO_PLANE:
        say("This kernel has no plane to serve an image on (erofs-loader probe says what is missing):")
        say("the demo runs in a virtual machine with a kernel that has one.")
        link = ["--rate", str(options.rate), "--rtt", str(options.rtt)]
        raise SystemExit(subprocess.run([sys.executable, "-m", "bench.demo_vm", *link]).returncode)
    with tempfile.TemporaryDirectory(prefix="erofs-demo-") as scratch:
        demo(options.rate, options.rtt, options.json, Path(scratch))


if __name__ == "__main__":
    main()
