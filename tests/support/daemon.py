"""A real `erofs-loader` daemon for tests, an image to serve, and readers in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mounts import mountinfo, umount2
from mounts.syscalls import MNT_DETACH

PATIENCE = 60.0
LOADER = (sys.executable, "-c", "from loader.cli.loader import main; main()")
BUILDER = (sys.executable, "-c", "from loader.cli.builder import main; main()")
REPOSITORY = Path(__file__).parent.parent.parent

READER = """
import hashlib, os, random, sys
root, seed = sys.argv[1], int(sys.argv[2])
names = sorted(os.path.relpath(os.path.join(d, n), root) for d, _, files in os.walk(root) for n in files)
random.Random(seed).shuffle(names)
for name in names:
    try:
        with open(os.path.join(root, name), "rb") as stream:
            print(name, hashlib.sha256(stream.read()).hexdigest(), flush=True)
    except OSError as error:
        print(name, "errno", error.errno, flush=True)
"""

CAT = """
import hashlib, sys
try:
    with open(sys.argv[1], "rb") as stream:
        print(hashlib.sha256(stream.read()).hexdigest())
except OSError as error:
    print("errno", error.errno)
"""


def make_tree(directory: Path, seed: int = 1) -> dict[str, str]:
    """Files of several sizes, some of which do not compress; relative path to sha256."""
    rng = random.Random(seed)
    digests = {}
    for number in range(120):
        size = rng.choice((1, 700, 4096, 5000, 30_000))
        digests[f"small/{number % 7}/{number}"] = _write(directory / f"small/{number % 7}/{number}", rng, size, True)
    for number in range(8):
        digests[f"large/{number}"] = _write(
            directory / f"large/{number}", rng, 300_000 + 150_001 * number, number % 2 > 0
        )
    return digests


def _write(path: Path, rng: random.Random, size: int, compressible: bool) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = rng.randbytes(size)
    if compressible:
        data = (data[: size // 3].hex().encode() * 3)[:size]
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def make_files(directory: Path, count: int, size: int) -> dict[str, str]:
    """Files of one size that do not compress; name to sha256."""
    rng = random.Random(count)
    return {f"{number:03}": _write(directory / f"{number:03}", rng, size, False) for number in range(count)}


def start_cat(file: Path) -> subprocess.Popen[str]:
    """A process that prints one file's sha256, or `errno N`."""
    return subprocess.Popen([sys.executable, "-S", "-c", CAT, str(file)], stdout=subprocess.PIPE, text=True)


def convert(source: Path, target: str, config: Path | None = None) -> None:
    """Publish the artifact of a directory tree."""
    environment = os.environ | ({"EROFS_LOADER_CONFIG": str(config)} if config else {})
    command = [*BUILDER, "convert", f"rootfs:{source}", target]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, env=environment)


class Daemon:
    """`erofs-loader serve` with its state below `directory`, until the end of the `with` block."""

    def __init__(
        self, directory: Path, *options: str, root: Path | None = None, command: Sequence[str] = LOADER
    ) -> None:
        """`command`: what the daemon is started with."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.root, self.socket, self.log = root or directory / "root", directory / "s.sock", directory / "serve.log"
        self._options, self._command = options, command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is None:  # a stopped one may have left its keeper to guard the mounts
            self.start()
        self.command("stop", "--umount")
        self.wait()
        for mount in mountinfo("erofs"):
            if mount.target.startswith(f"{self.directory}/"):
                umount2(mount.target, MNT_DETACH)
                raise AssertionError(f"{mount.target} was left mounted")

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--root", str(self.root), "--socket", str(self.socket), "serve", *self._options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY,
            )  # fmt: skip
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            if self.socket.exists() and self.run("status").returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"the daemon does not start: {self.log.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """SIGTERM, as a service manager sends it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self.wait()

    def wait(self) -> None:
        assert self._process is not None
        assert self._process.wait(PATIENCE) == 0, self.log.read_text()[-4000:]
        self._process = None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*LOADER, "--root", str(self.root), "--socket", str(self.socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=PATIENCE * 2)

    def command(self, *arguments: str) -> Any:
        """A command that must succeed; its JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.returncode} {done.stderr} {self.log.read_text()[-4000:]}"
        return json.loads(done.stdout)

    def mount(self, image: str, name: str = "mnt") -> Path:
        target = self.directory / name
        target.mkdir(exist_ok=True)
        self.command("mount", image, str(target))
        return target

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self.command("stats")["counters"]
        return counters

    def worker(self) -> int:
        """The worker's pid."""
        return int(self.command("status")["worker"]["pid"])


def start_reader(root: Path, seed: int) -> subprocess.Popen[str]:
    """A process that reads every file below `root`, in an order of its own."""
    return subprocess.Popen([sys.executable, "-c", READER, str(root), str(seed)], stdout=subprocess.PIPE, text=True)


def result(reader: subprocess.Popen[str]) -> dict[str, str]:
    """What a reader saw: relative path to sha256 or `errno N`. Fails if it is stuck."""
    output, _ = reader.communicate(timeout=PATIENCE * 2)
    assert reader.returncode == 0
    return dict(line.split(" ", 1) for line in output.splitlines())


def read_all(root: Path, seed: int = 0) -> dict[str, str]:
    return result(start_reader(root, seed))


def drop_caches() -> None:
    """Make the next reads ask again. (What is dirty stays, but no page of an EROFS is.)"""
    Path("/proc/sys/vm/drop_caches").write_text("3")
