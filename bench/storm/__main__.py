"""`python -m bench.storm`: kill the daemon's processes at random moments while readers compare every byte.

Two parts. The *storm*: single processes, and keeper and worker together, are killed, stopped, starved and upgraded;
readers must see nothing of it. *Everything*: all processes in one instant, with nobody left to hold the kernel's
descriptors; the encoded form may give errors but no wrong byte and must go on by itself after the restart, mounts of
the decoded form must be gone after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.link import Link
from bench.node import drop_caches
from bench.storm.board import FORMS, METHODS, Board
from bench.storm.images import LARGE, SMALL, TOOL, make_tree, publish
from bench.storm.victim import KINDS, Victim
from mounts import mountinfo
from tests.support.registry import docker_registry

STUCK = 75.0  # seconds that an operation may take once nothing is killed any more: more than the daemon's deadline
_PATHS = [f"large/{n}" for n in range(LARGE)] + [f"small/{n}" for n in range(SMALL)] + [TOOL]


class Storm:
    """Images, readers and a daemon in `directory`, behind a link of `rate` bytes a second."""

    def __init__(self, directory: Path, address: str, images: int, readers: int) -> None:
        self.directory, self.address = directory, address
        self.images = [str(number) for number in range(images)]
        self.victim = Victim(directory / "node")
        self.board = Board(directory / "board", readers, create=True)
        self.rng = random.Random(directory.name)
        self.kills: Counter[str] = Counter()
        self.descriptors: list[dict[str, int]] = []
        self.wrong_while_dead = 0
        self.fenced = self.healed = 0

    def target(self, image: str, form: str) -> Path:
        return self.directory / "mnt" / f"{image}-{form}"

    def reference(self, image: str) -> str:
        return f"docker://{self.address}/storm/image{image}:1"

    def mount(self, forms: tuple[str, ...] = FORMS) -> None:
        for image in self.images:
            for form in forms:
                target = self.target(image, form)
                target.mkdir(parents=True, exist_ok=True)
                body = {"image": self.reference(image), "target": str(target), "form": form}
                self.victim.ask("POST", "/v1/mounts", **body)

    def umount(self) -> None:
        """Leave nothing mounted and nothing cached."""
        for mount in self.victim.ask("GET", "/v1/mounts"):
            self.victim.ask("DELETE", "/v1/mounts", target=mount["target"])
        self.victim.ask("POST", "/v1/gc", everything=True)

    @contextlib.contextmanager
    def readers(self, number: int, forms: tuple[str, ...] = FORMS) -> Iterator[None]:
        spec = [
            (str(self.target(image, form)), form, str(self.directory / "trees" / image), _PATHS)
            for image in self.images
            for form in forms
        ]
        command = [sys.executable, "-m", "bench.storm.reader", str(self.directory / "board"), str(self.board.readers)]
        with (self.directory / "readers.log").open("ab") as log:
            running = [
                subprocess.Popen([*command, str(n), json.dumps(spec)], stdin=subprocess.PIPE, stdout=log, stderr=log)
                for n in range(number)
            ]
        try:
            yield
        finally:
            for process in running:
                assert process.stdin is not None
                process.stdin.close()
            for process in running:
                if process.wait(STUCK * 2):
                    raise RuntimeError(f"a reader ended with {process.returncode}: see {self.directory}/readers.log")

    def quiet(self) -> None:
        """Let every reader end what it does; a reader that cannot is stuck."""
        self.board.paused = True
        until = time.monotonic() + STUCK
        while busy := [row for row in self.board.rows() if row.since]:
            if time.monotonic() > until:
                raise RuntimeError(f"{len(busy)} readers are stuck")
            time.sleep(0.05)

    def round(self, kills: int, until: float) -> None:
        """Mount cold, kill while reading, let all come to rest, compare the descriptors."""
        self.mount()
        self.board.paused = False
        drop_at = time.monotonic() + 5
        done = 0
        while done < kills and time.monotonic() < until:
            self._wait()
            kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
            if self.victim.kill(kind, self.rng):
                self.kills[kind] += 1
                done += 1
            self.victim.reap_orphans()
            if time.monotonic() > drop_at:  # so that what is cached is asked for again
                drop_caches()
                drop_at = time.monotonic() + 5
        self.quiet()
        self.umount()
        self.descriptors.append(self.victim.descriptors())

    def _wait(self) -> None:
        """A random moment: mostly soon after something was read, now and then before the last kill is got over."""
        if self.rng.random() < 0.8:
            before, until = self._reads(), time.monotonic() + 4
            while self._reads() == before and time.monotonic() < until:
                time.sleep(0.01)
        time.sleep(self.rng.uniform(0, self.rng.choice((0.05, 0.3, 1.0))))

    def _reads(self) -> int:
        return sum(self.board.total(method) for method in METHODS)

    def everything(self) -> None:
        """Kill every process at once while readers read cold; then start again."""
        self.mount()
        self.board.paused = False
        time.sleep(self.rng.uniform(0.1, 1.0))
        before = self.board.total("wrong_decoded")
        self.victim.kill_everything(self.rng)
        time.sleep(self.rng.uniform(0, 0.3))
        self.quiet()
        self.victim.start()
        self.wrong_while_dead += self.board.total("wrong_decoded") - before
        mounted = {mount.target for mount in mountinfo("erofs")}
        self.fenced += sum(str(self.target(image, "decoded")) not in mounted for image in self.images)
        self._check_encoded()
        self.kills["everything"] += 1
        self.umount()

    def _check_encoded(self) -> None:
        """The same mounts must give every byte again."""
        for image in self.images:
            target, tree = self.target(image, "encoded"), self.directory / "trees" / image
            same = subprocess.run(["diff", "-rq", str(tree), str(target)], capture_output=True, timeout=STUCK * 2)
            self.healed += same.returncode == 0

    def report(self) -> dict[str, Any]:
        board = self.board
        return {
            "kills": dict(self.kills),
            "kills in all": sum(self.kills.values()),
            **self.victim.unanswered(),
            "reads in all": self._reads(),
            "reads": {method: board.total(method) for method in METHODS},
            "reads that gave an error": board.total("errors"),
            "wrong bytes, encoded": board.total("wrong_encoded"),
            "wrong bytes, decoded": board.total("wrong_decoded") - self.wrong_while_dead,
            "wrong bytes, decoded, while every process was dead": self.wrong_while_dead,
            "decoded mounts fenced": self.fenced,
            "encoded mounts right again without a remount": self.healed,
            "longest read, s": round(max(row.longest for row in board.rows()), 1),
            "descriptors after the first and the last round": [self.descriptors[0], self.descriptors[-1]]
            if self.descriptors
            else [],
        }


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Both parts; what was seen."""
    with docker_registry(directory / "registry") as registry, Link(registry, options.rate, 0.02) as link:
        storm = Storm(directory, link.address, options.images, options.readers)
        for image in storm.images:
            make_tree(directory / "trees" / image, int(image))
            publish(directory / "trees" / image, f"docker://{registry}/storm/image{image}:1")
        storm.victim.start()
        until = time.monotonic() + options.seconds
        storm.board.paused = True
        try:
            with storm.readers(options.readers):
                while sum(storm.kills.values()) < options.kills and time.monotonic() < until:
                    storm.round(min(100, options.kills - sum(storm.kills.values())), until)
                    _show(options, storm)
                while storm.kills["everything"] < options.everything and time.monotonic() < until:
                    storm.everything()
                    _show(options, storm)
        finally:
            storm.victim.stop()
        return storm.report()


def _show(options: argparse.Namespace, storm: Storm) -> None:
    if options.progress:
        print(json.dumps(storm.report()), flush=True)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.storm", description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--everything", type=int, default=500, help="times that every process is killed at once")
    parser.add_argument("--seconds", type=float, default=6 * 3600, help="end after this time in any case")
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e6, help="bytes a second of the link to the registry")
    parser.add_argument("--progress", action="store_true", help="a line of JSON after each round")
    parser.add_argument("--keep", action="store_true", help="keep the logs, and say where")
    return parser.parse_args(arguments)


def failed(report: dict[str, Any]) -> bool:
    """Whether something happened that must not."""
    everything = report["kills"].get("everything", 0)
    return bool(
        report["wrong bytes, encoded"]
        or report["wrong bytes, decoded"]
        or (everything and report["decoded mounts fenced"] % everything)
        or report["decoded mounts fenced"] != report["encoded mounts right again without a remount"]
    )


def main() -> int:
    options = options_of()
    directory = Path(tempfile.mkdtemp(prefix="storm-", dir=os.environ.get("TMPDIR", "/tmp")))
    print(f"storm in {directory}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = run(options, directory)
    print(json.dumps(report, indent=2))
    if not options.keep:
        subprocess.run(["rm", "-rf", str(directory)], check=True)
    return int(failed(report))


if __name__ == "__main__":
    sys.exit(main())
