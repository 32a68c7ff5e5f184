"""One node under a storm: `python -m bench.storm.node SPEC`, until it is done or its standard input ends.

It writes what it saw so far to DIRECTORY/report.json whenever everything is at rest. SPEC is the JSON of `Spec`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.storm.board import FORMS, METHODS, Board
from bench.storm.images import LARGE, SMALL, TOOL
from bench.storm.victim import KINDS, Victim
from mounts import mountinfo

STUCK = 240.0  # seconds in which operations must end once nothing is killed any more: more than the daemon's deadline
_ROUND = 40  # kills between two times at rest: by then most of the images is cached
_SETTLE = 20.0  # seconds in which descriptors of what was unmounted must be closed
_DROP = 5.0  # seconds between two times that what is cached is asked for again
_PATHS = [f"large/{n}" for n in range(LARGE)] + [f"small/{n}" for n in range(SMALL)] + [TOOL]


class Spec(NamedTuple):
    """`images` are published at `address`/storm/imageN:1 and lie as trees in `trees`/N; `until`: time.monotonic()."""

    directory: str
    address: str
    trees: str
    images: int
    readers: int
    kills: int
    everything: int
    until: float


class StuckError(Exception):
    """Readers that do not come to rest although nothing is killed any more; or nobody is left to kill."""


class Storm:
    """Readers and a daemon in the directory of `spec`."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.directory, self.trees = spec, Path(spec.directory), Path(spec.trees)
        self.directory.mkdir(parents=True)
        self.images = [str(number) for number in range(spec.images)]
        self.victim = Victim(self.directory / "n")  # short: a Unix socket lies in it
        self.board = Board(self.directory / "board", spec.readers, create=True)
        self.board.paused = True
        self.rng = random.Random(spec.directory)
        self.kills: Counter[str] = Counter()
        self.descriptors: list[dict[str, int]] = []
        self.wrong_while_dead = self.fenced = self.healed = self.stuck = 0
        self.slowest_rest = 0.0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.spec.until and not select.select([0], [], [], 0)[0]

    def run(self) -> None:
        self.victim.start()
        with self.readers():
            while self.kills.total() < self.spec.kills and self.goes_on:
                self.round(min(_ROUND, self.spec.kills - self.kills.total()))
                self.write()
            while self.kills["everything"] < self.spec.everything and self.goes_on:
                self.everything()
                self.write()
        self.victim.stop()

    def target(self, image: str, form: str) -> Path:
        return self.directory / "mnt" / f"{image}-{form}"

    def mount(self) -> None:
        for image in self.images:
            for form in FORMS:
                target = self.target(image, form)
                target.mkdir(parents=True, exist_ok=True)
                reference = f"docker://{self.spec.address}/storm/image{image}:1"
                self.victim.ask("POST", "/v1/mounts", image=reference, target=str(target), form=form)

    def umount(self) -> None:
        """Leave nothing mounted and nothing cached."""
        for mount in self.victim.ask("GET", "/v1/mounts"):
            self.victim.ask("DELETE", "/v1/mounts", target=mount["target"])
        self.victim.ask("POST", "/v1/gc", everything=True)

    @contextlib.contextmanager
    def readers(self) -> Iterator[None]:
        mounts = [
            (str(self.target(image, form)), form, str(self.trees / image), _PATHS)
            for image in self.images
            for form in FORMS
        ]
        arguments = [str(self.directory / "board"), str(self.board.readers), json.dumps(mounts)]
        with (self.directory / "readers.log").open("ab") as log:
            command = [sys.executable, "-m", "bench.storm.reader", *arguments]
            running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            yield
        finally:
            assert running.stdin is not None
            running.stdin.close()
            if status := running.wait(STUCK * 2):
                raise RuntimeError(f"the readers ended with {status}: see {self.directory}/readers.log")

    def quiet(self) -> None:
        """Let every reader end what it does; a reader that cannot is stuck."""
        self.board.paused = True
        began = time.monotonic()
        while busy := sum(row.since > 0 for row in self.board.rows()):
            if time.monotonic() - began > STUCK:
                self.stuck += busy
                self.victim.complain()
                raise StuckError(f"{busy} readers are stuck")
            time.sleep(0.02)
        self.slowest_rest = max(self.slowest_rest, time.monotonic() - began)

    def round(self, kills: int) -> None:
        """Mount cold, kill while reading, let all come to rest, compare the descriptors."""
        self.mount()
        self.board.paused = False
        drop_at = time.monotonic() + _DROP
        done, done_at = 0, time.monotonic()
        while done < kills and self.goes_on:
            self._wait()
            if time.monotonic() - done_at > STUCK:
                raise StuckError("no process came that could be killed")
            kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
            if self.victim.kill(kind, self.rng):
                self.board.kills += 1
                self.kills[kind] += 1
                done, done_at = done + 1, time.monotonic()
            self.victim.reap_orphans()
            if time.monotonic() > drop_at:
                self.drop_caches()
                drop_at = time.monotonic() + _DROP
        self.quiet()
        self.umount()
        self.descriptors.append(self._settled())

    def drop_caches(self) -> None:
        """Drop what the kernel has of the mounts' files and of the cache, and of nothing else on this machine."""
        mounted = (self.target(image, form) / path for image in self.images for form in FORMS for path in _PATHS)
        for path in (*mounted, *self.victim.cache_files()):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)

    def _settled(self) -> dict[str, int]:
        """How many descriptors there are: those of the first round, or more if they stay."""
        until = time.monotonic() + _SETTLE
        while True:
            time.sleep(0.1)
            # The worker that waits is there again, and what forks the next.
            complete = len(self.victim.workers()) > 1 and bool(self.victim.nurseries())
            names = self.victim.descriptors()
            found = {name: len(open_files) for name, open_files in names.items()}
            first = self.descriptors[0] if self.descriptors else found
            if complete and all(found[name] <= first[name] for name in found):
                return found
            if time.monotonic() > until:
                print(f"descriptors stay: first {first}, now {names}", flush=True)
                return found

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
        self.wrong_while_dead += self.board.total("wrong_decoded") - before
        self.victim.start()
        mounted = {mount.target for mount in mountinfo("erofs")}
        self.fenced += sum(str(self.target(image, "decoded")) not in mounted for image in self.images)
        self._check_encoded()
        self.kills["everything"] += 1
        self.umount()

    def _check_encoded(self) -> None:
        """The same mounts must give every byte again."""
        for image in self.images:
            target, tree = self.target(image, "encoded"), self.trees / image
            same = subprocess.run(["diff", "-rq", str(tree), str(target)], capture_output=True, timeout=STUCK * 2)
            self.healed += same.returncode == 0

    def report(self) -> dict[str, Any]:
        board = self.board
        longest = max(board.rows(), key=lambda row: row.longest)
        first, last = (self.descriptors[0], self.descriptors[-1]) if self.descriptors else ({}, {})
        return {
            "kills": dict(self.kills),
            **self.victim.unanswered(),
            "reads": {method: board.total(method) for method in METHODS},
            "reads that gave an error": board.total("errors"),
            "wrong bytes, encoded": board.total("wrong_encoded"),
            "wrong bytes, decoded": board.total("wrong_decoded") - self.wrong_while_dead,
            "wrong bytes, decoded, while every process was dead": self.wrong_while_dead,
            "decoded mounts fenced": self.fenced,
            "encoded mounts right again without a remount": self.healed,
            "readers stuck": self.stuck,
            "descriptors leaked": sum(max(0, last[name] - first[name]) for name in first),
            "longest operation, s": round(longest.longest, 1),
            "kills during it": longest.kills,
            "longest time to rest after the last kill of a round, s": round(self.slowest_rest, 1),
        }

    def write(self) -> None:
        """Replace the report in one step."""
        path = self.directory / "report.json"
        path.with_suffix(".new").write_text(json.dumps(self.report()))
        path.with_suffix(".new").replace(path)


def main() -> int:
    storm = Storm(Spec(**json.loads(sys.argv[1])))
    try:
        storm.run()
    except BaseException:
        traceback.print_exc()
        storm.write()
        storm.victim.abandon()
        return 1
    storm.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
