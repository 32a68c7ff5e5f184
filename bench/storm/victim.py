"""The daemon under the storm: its processes, what kills them, and its control socket."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mounts import mountinfo, umount2
from mounts.syscalls import MNT_DETACH

_REPOSITORY = Path(__file__).resolve().parents[2]
_SERVE = "from loader.cli.loader import main; main()"
_PR_SET_CHILD_SUBREAPER = 36
_PIDFD = "anon_inode:[pidfd]"
_PATIENCE = 240.0  # seconds: on a busy machine a start takes long
# Kinds of kill and how often each comes, in per mille.
KINDS = {
    "worker SIGKILL": 560,
    "standby SIGKILL": 30,
    "nursery SIGKILL": 30,
    "worker out of memory": 40,
    "worker SIGSTOP": 3,
    "upgrade (SIGHUP)": 50,
    "keeper SIGKILL": 180,
    "keeper and worker SIGKILL": 82,
    "supervisor SIGKILL": 25,
}


class _Control(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("control", timeout=_PATIENCE)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


class Victim:
    """A daemon with its state below `directory`. Its processes become ours when their parents die."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.root, self._socket, self.log = directory / "root", directory / "s.sock", directory / "serve.log"
        self.supervisor = 0
        self._process: subprocess.Popen[bytes] | None = None  # while it starts
        self._dying = 0  # the keeper that was killed last: it may take a while to go
        self._oom = _MemoryGroup(f"storm-{os.getpid()}-{directory.name}")
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self) -> None:
        """Start; returns once a worker answers."""
        options = ["--root", str(self.root), "--socket", str(self._socket), "serve"]
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", _SERVE, *options]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=_REPOSITORY)
        self.supervisor = self._process.pid
        self.ask("GET", "/v1/status")
        self._process = None

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """One request, repeated while no worker answers."""
        until = time.monotonic() + _PATIENCE
        if method == "DELETE":
            path, body = f"{path}?{urlencode(body)}", {}
        while True:
            connection = _Control(self._socket)
            try:
                connection.request(method, path, json.dumps(body) if body else None)
                response = connection.getresponse()
                document = json.loads(response.read())
                if response.status == 200 or (method == "DELETE" and response.status == 404):
                    return document
                failure = f"{method} {path} {body}: {document}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{method} {path}: {error!r}"
            finally:
                connection.close()
            if time.monotonic() > until or self._ended_by_itself():
                raise RuntimeError(f"{failure}; the log ends: {self.log.read_text()[-400:]}")
            time.sleep(0.05)

    def _ended_by_itself(self) -> bool:
        """Whether the daemon gave up while it was started."""
        return self._process is not None and self._process.poll() is not None

    def keeper(self) -> int:
        """The keeper's pid, 0 while there is none."""
        return next(iter(_children(self.supervisor)), 0)

    def workers(self) -> list[int]:
        """The worker that serves, then the one that waits."""
        nurseries = self.nurseries()
        workers = [pid for pid in _children(self.keeper()) if pid not in nurseries]
        for parent in (*nurseries, os.getpid()):  # ours become those of a nursery that was killed
            workers += [pid for pid in _children(parent) if _is_nursery(pid)]
        return sorted((pid for pid in workers if not _is_zombie(pid)), key=_started)

    def nurseries(self) -> list[int]:
        return [pid for pid in _children(self.keeper()) if _is_nursery(pid)]

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Do one of KINDS; false if the process was not there just now."""
        keeper, workers = self.keeper(), self.workers()
        if not keeper or not workers:
            return False
        if kind == "worker SIGKILL":
            return _kill(workers[0])
        if kind == "standby SIGKILL":
            return len(workers) > 1 and _kill(workers[1])
        if kind == "nursery SIGKILL":
            return any(_kill(pid) for pid in self.nurseries())
        if kind == "worker out of memory":
            return self._oom.starve(workers[0])
        if kind == "worker SIGSTOP":
            return _kill(workers[0], signal.SIGSTOP)
        if kind == "upgrade (SIGHUP)":
            return _kill(self.supervisor, signal.SIGHUP)
        if kind == "keeper SIGKILL":
            self._dying = keeper
            return _kill(keeper)
        if kind == "keeper and worker SIGKILL":
            self._dying = keeper
            pair = [keeper, *workers]
            rng.shuffle(pair)
            killed = [_kill(pid) for pid in pair]  # all of them, whoever is gone already
            return all(killed)
        return self._kill_supervisor(keeper)

    def _kill_supervisor(self, keeper: int) -> bool:
        """The keeper must outlive it, and takes its place. Both dead would be everything that holds the mounts."""
        if keeper == self._dying or not _kill(self.supervisor):
            return False
        os.waitpid(self.supervisor, 0)
        self.supervisor = keeper
        until = time.monotonic() + _PATIENCE
        while not self.workers():
            if time.monotonic() > until:
                raise RuntimeError("nobody took the supervisor's place")
            time.sleep(0.02)
        return True

    def kill_everything(self, rng: random.Random) -> None:
        """Every process in one instant: none may run while the others die."""
        pids = self.processes()
        for pid in pids:
            _kill(pid, signal.SIGSTOP)
        rng.shuffle(pids)
        for pid in pids:
            _kill(pid)
        self.reap()

    def processes(self) -> list[int]:
        return [pid for pid in (self.supervisor, self.keeper(), *self.nurseries(), *self.workers()) if pid]

    def reap(self) -> None:
        """Until none of the daemon's processes is left."""
        until = time.monotonic() + _PATIENCE
        while [pid for pid in _children(os.getpid()) if _is_ours(pid)]:
            if time.monotonic() > until:
                raise RuntimeError("a process of the daemon does not die")
            self.reap_orphans()
            time.sleep(0.01)

    def reap_orphans(self) -> None:
        for pid in _children(os.getpid()):
            if _is_zombie(pid) and _is_ours(pid):
                os.waitpid(pid, 0)

    def descriptors(self) -> dict[str, list[str]]:
        """What each kind of process has open; of the worker, what is not a connection, and of the keeper nothing that
        stands for a living process: of workers, it has one for those that its nursery forked, and none for others."""
        pids = {"supervisor": self.supervisor, "keeper": self.keeper(), "worker": self.workers()[0]}
        found = {name: _open_files(pid) for name, pid in pids.items()}
        found["worker"] = [name for name in found["worker"] if not name.startswith("socket:")]
        return found

    def complain(self) -> None:
        """Have everything in flight and all stacks logged."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            _kill(self.supervisor, number)
            time.sleep(1)

    def stop(self) -> None:
        """End the daemon and unmount what is left."""
        self.ask("POST", "/v1/stop", mode="umount")
        self.reap()
        for mount in mountinfo("erofs"):
            if mount.target.startswith(f"{self.root.parent.parent}/"):
                umount2(mount.target, MNT_DETACH)
        self._oom.close()

    def abandon(self) -> None:
        """Leave no process and no mount, whatever state they are in."""
        for mount in mountinfo("erofs"):
            if mount.target.startswith(f"{self.root.parent.parent}/"):
                umount2(mount.target, MNT_DETACH)
        for _ in range(50):  # who dies is replaced, until nobody is left who could
            for pid in [pid for pid in (*self.processes(), *_children(os.getpid())) if _is_ours(pid)]:
                _kill(pid)
            self.reap_orphans()
            time.sleep(0.05)

    def cache_files(self) -> list[Path]:
        return list((self.root / "blobs").glob("*"))

    def unanswered(self) -> dict[str, int]:
        """From the log: deaths at which requests were unanswered, and events that no journal had."""
        text = self.log.read_text(errors="replace")
        held = [int(number) for number in re.findall(r"; (\d+) requests go to the next", text)]
        adopted = [int(number) for number in re.findall(r"took over (\d+) requests", text)]
        return {
            "worker deaths": len(held),
            "worker deaths with requests unanswered": sum(number > 0 for number in held),
            "keeper deaths": len(adopted),
            "keeper deaths with requests unanswered": sum(number > 0 for number in adopted),
        }


class _MemoryGroup:
    """A memory cgroup whose limit kills whoever allocates in it."""

    def __init__(self, name: str) -> None:
        self._path: Path | None = None
        for parent, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
            path = Path("/sys/fs/cgroup", parent, name)
            try:
                path.mkdir()
                (path / limit).write_text("65536")
                self._path = path
                return
            except OSError:
                if path.exists():
                    path.rmdir()

    def starve(self, pid: int) -> bool:
        if self._path is None:
            return False
        try:
            (self._path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._path is not None:
            self._path.rmdir()


def _kill(pid: int, number: int = signal.SIGKILL) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return not _is_zombie(pid) or number == signal.SIGKILL


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children") if pid else ():
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            pass
    return found


def _is_ours(pid: int) -> bool:
    """Whether a child of the storm is a process of the daemon, and not a reader, registry or link."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return not command or b"loader." in command


def _is_nursery(pid: int) -> bool:
    try:
        return b"loader.worker.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _open_files(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if name != _PIDFD or "Pid:\t-1\n" in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text():
                found.append(name)
    return found


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z"] + ["0"] * 30


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[0] == "Z"


def _started(pid: int) -> int:
    return int(_stat(pid)[19])
