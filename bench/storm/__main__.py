"""`python -m bench.storm`: kill the daemon's processes at random moments while readers compare every byte.

Two parts, on nodes of their own beside each other. The *storm*: single processes, and keeper and worker together, are
killed, stopped, starved and upgraded; readers must see nothing of it. *Everything*: all processes in one instant, with
nobody left to hold the kernel's descriptors; the encoded form may give errors but no wrong byte and must go on by
itself after the restart, mounts of the decoded form must be gone after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.link import Link
from bench.storm.images import make_tree, publish
from bench.storm.node import STUCK, Spec
from tests.support.registry import docker_registry

_LARGEST = "longest"  # what begins so is not added up: the largest counts
_EVERYTHING_READERS, _EVERYTHING_IMAGES = 12, 1


def specs(options: argparse.Namespace, directory: Path, address: str, until: float) -> list[Spec]:
    """What each node does: `options.nodes` share the kills of single processes, as many the kills of everything."""
    made = []
    for count, images, readers, kind in (
        (options.kills, options.images, options.readers, "storm"),
        (options.everything, _EVERYTHING_IMAGES, _EVERYTHING_READERS, "all"),
    ):
        nodes = min(options.nodes, count)
        for number in range(nodes):
            share = count // nodes + (number < count % nodes)
            kills, everything = (share, 0) if kind == "storm" else (0, share)
            name = str(directory / f"{kind}{number}")
            made.append(Spec(name, address, str(directory / "trees"), images, readers, kills, everything, until))
    return made


def summary(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The nodes' reports as one."""
    total: dict[str, Any] = {}
    for report in reports:
        if report["longest operation, s"] > total.get("longest operation, s", 0):
            total["kills during it"] = 0
        elif "longest operation, s" in total:
            report = report | {"kills during it": 0}
        for name, value in report.items():
            if isinstance(value, dict):
                part = total.setdefault(name, {})
                for key, count in value.items():
                    part[key] = part.get(key, 0) + count
            elif name.startswith(_LARGEST):
                total[name] = max(total.get(name, 0), value)
            else:
                total[name] = total.get(name, 0) + value
    for name in ("kills", "reads"):
        total[f"{name} in all"] = sum(total.get(name, {}).values())
    return total


class Storms:
    """The nodes as processes; their reports, in `results` also those of a run that is cut off."""

    def __init__(self, nodes: list[Spec], directory: Path, results: Path | None) -> None:
        self._directories, self._results = [Path(spec.directory) for spec in nodes], results
        self._began, self._last = time.monotonic(), ""
        with (directory / "nodes.log").open("ab") as log:
            self.running = [
                subprocess.Popen(
                    [sys.executable, "-m", "bench.storm.node", json.dumps(spec._asdict())],
                    stdin=subprocess.PIPE, stdout=log, stderr=log,
                )
                for spec in nodes
            ]  # fmt: skip

    def report(self) -> dict[str, Any]:
        found = []
        for directory in self._directories:
            with contextlib.suppress(FileNotFoundError):
                found.append(json.loads((directory / "report.json").read_text()))
        return summary(found)

    def wait(self) -> None:
        """Until all have ended."""
        while any(process.poll() is None for process in self.running):
            time.sleep(1)
            text = json.dumps(self.report())
            if self._results is not None and text != self._last:
                line = json.dumps({"seconds": round(time.monotonic() - self._began)} | json.loads(text))
                with self._results.open("a") as stream:
                    stream.write(line + "\n")
            self._last = text

    def end(self) -> int:
        """Let all end in order, each at its next time at rest; how many ended with an error."""
        for process in self.running:
            assert process.stdin is not None
            process.stdin.close()
        return sum(process.wait(STUCK * 4) != 0 for process in self.running)


@contextlib.contextmanager
def registry(directory: Path, images: int, rate: float) -> Iterator[str]:
    """A registry with the images, behind a link of `rate` bytes a second; its address."""
    with docker_registry(directory / "registry") as origin, Link(origin, rate, 0.02) as link:
        for number in range(images):
            make_tree(directory / "trees" / str(number), number)
            publish(directory / "trees" / str(number), f"docker://{origin}/storm/image{number}:1")
        yield link.address


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Both parts; what was seen."""
    rate = options.rate * options.nodes * ((options.kills > 0) + (options.everything > 0))
    with registry(directory, options.images, rate) as address:
        until = time.monotonic() + options.seconds
        storms = Storms(specs(options, directory, address, until), directory, options.results)
        with contextlib.suppress(KeyboardInterrupt):
            storms.wait()
        broken = storms.end()
        return storms.report() | {"nodes that ended with an error": broken}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.storm", description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--everything", type=int, default=500, help="times that every process is killed at once")
    parser.add_argument("--seconds", type=float, default=6 * 3600, help="end after this time in any case")
    parser.add_argument("--nodes", type=int, default=3, help="nodes of each part, beside each other")
    parser.add_argument("--readers", type=int, default=64, help="of each node")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second and node from the registry")
    parser.add_argument(
        "--results", type=Path, help="append what was seen so far to this file, a line of JSON each time"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    return parser.parse_args(arguments)


def failed(report: dict[str, Any]) -> bool:
    """Whether something happened that must not."""
    everything = report["kills"].get("everything", 0)
    return bool(
        report["wrong bytes, encoded"]
        or report["wrong bytes, decoded"]
        or report["readers stuck"]
        or report["descriptors leaked"]
        or report["nodes that ended with an error"]
        or report["decoded mounts fenced"] != everything
        or report["encoded mounts right again without a remount"] != everything
    )


def main() -> int:
    options = options_of()
    directory = Path(tempfile.mkdtemp(prefix="storm-", dir=os.environ.get("TMPDIR", "/tmp")))
    print(f"storm in {directory}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either ends it in order
    report = run(options, directory)
    print(json.dumps(report, indent=2))
    if not options.keep:
        subprocess.run(["rm", "-rf", str(directory)], check=True)
    return int(failed(report))


if __name__ == "__main__":
    sys.exit(main())
