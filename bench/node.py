"""A node: an `erofs-loader` daemon of one's own with an empty cache, and its commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

LOADER = Path(sys.executable).parent / "erofs-loader"
BUILDER = Path(sys.executable).parent / "erofs-builder"


def drop_caches() -> None:
    """Make the page cache cold."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return _number(f"/proc/{pid}/status", "VmRSS") * 1024


def written(pid: int) -> int:
    """Bytes that a process has caused to be written to a disk."""
    return _number(f"/proc/{pid}/io", "write_bytes")


def _number(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise KeyError(f"{path}: no {name}")


class Node:
    """A daemon with its state under `root` while the context is open; `options` go to `erofs-loader serve`."""

    def __init__(self, root: Path, *options: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.options = root, options
        self._environment = {
            **os.environ,
            "EROFS_LOADER_ROOT": str(root / "state"),
            "EROFS_LOADER_SOCKET": str(root / "control.sock"),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        """What the daemon wrote."""
        return self.root / "serve.log"

    @property
    def pid(self) -> int:
        """The process that `serve` is."""
        assert self._process is not None
        return self._process.pid

    @property
    def state(self) -> Path:
        """Its cache and records."""
        return self.root / "state"

    def processes(self) -> list[int]:
        """All processes of the daemon."""
        return descendants(self.pid)

    def start(self) -> None:
        """Start the daemon; returns once it answers."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [LOADER, "serve", *self.options],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for _ in range(300):
            if self._process.poll() is not None:
                break
            if (self.root / "control.sock").exists() and self.try_run("status", "--json").returncode == 0:
                return
            time.sleep(0.1)
        self.stop()
        raise RuntimeError("erofs-loader serve does not start: " + self.log.read_text()[-3000:])

    def stop(self) -> None:
        """End the daemon as a service manager would."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def try_run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run an `erofs-loader` command against this daemon."""
        return subprocess.run(
            [LOADER, *arguments], env=self._environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def begin(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start an `erofs-loader` command against this daemon; ending it is up to the caller."""
        null = subprocess.DEVNULL
        return subprocess.Popen([LOADER, *arguments], env=self._environment, stdin=null, stdout=null, stderr=null)

    def run(self, *arguments: str | Path) -> str:
        """Run an `erofs-loader` command that must succeed; returns its output."""
        done = self.try_run(*arguments)
        if done.returncode:
            raise RuntimeError(f"erofs-loader {' '.join(map(str, arguments))}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def ask(self, *arguments: str | Path) -> Any:
        """Run a command with --json; returns the document."""
        return json.loads(self.run(*arguments, "--json"))

    def mount(self, reference: str, target: Path, form: str = "encoded") -> None:
        """Mount an image at `target`, which is made."""
        target.mkdir(parents=True, exist_ok=True)
        self.run("mount", "--form", form, reference, target)

    def umount(self, target: Path) -> None:
        """Unmount what `mount` mounted."""
        self.run("umount", target)
