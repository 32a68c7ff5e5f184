"""The product in the guest: the daemon started as a person would, its commands, and trees compared with digests."""

import hashlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import forks
from lib import DISK, Failure, expect, wait_for

ROOT = DISK / "loader"
SOCKET = Path("/run/erofs-loader/control.sock")
REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"EROFS_LOADER_ROOT": str(ROOT), "EROFS_LOADER_SOCKET": str(SOCKET), "PYTHONPATH": str(REPOSITORY)}
LOG = Path("/run/disk/serve.log")


def load(native):
    """Import what the program's commands import, for all the forks to come."""
    for name in ("control_http", "loader", "loader_client", "loader_serve"):
        importlib.import_module(f"loader.cli.{name}")
    if not native:
        forks.load()
        forks.use()


class Program:
    """`erofs-loader WORDS` in a process of its own, with its output in files.

    A fork of this process, which has imported the program: under emulation every start of Python takes seconds. So is
    what the program itself starts (forks.py), but on the host's own kernel.
    """

    def __init__(self, words, out, err):
        self.words = ["erofs-loader", *map(str, words)]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.closerange(3, 4096)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
            os.environ.update(ENVIRONMENT)
            os._exit(_exit_status(self.words))

    def poll(self):
        """The exit status, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, limit):
        """The exit status; Failure (and SIGKILL) if it does not end."""
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            late = not select.select([pidfd], [], [], limit)[0]
            os.close(pidfd)
            if late:
                os.kill(self.pid, signal.SIGKILL)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            expect(not late, f"{' '.join(self.words)}: no end after {limit} s")
        return self.returncode


def loader(*arguments, ok=True, limit=120):
    """One `erofs-loader` command; its outcome."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = Program(arguments, out, err)
        status = program.wait(limit)
        for stream in (out, err):
            stream.seek(0)
        done = subprocess.CompletedProcess(program.words, status, out.read(), err.read())
    if ok and done.returncode:
        raise Failure(f"{' '.join(done.args)}: exit {status}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def _exit_status(words):
    """What the process would have ended with."""
    from loader.cli.loader import main

    sys.argv = words
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def loader_json(*arguments):
    """One `erofs-loader … --json` command's document."""
    return json.loads(loader(*arguments, "--json").stdout)


class Daemon:
    """`erofs-loader serve` for the cell's plane and form."""

    def __init__(self, guest, *options):
        self.options = ["--plane", guest.task["plane"], "--form", guest.task["form"], "--insecure", *options]
        self.process = None

    def start(self):
        """Start it and wait until it answers."""
        SOCKET.parent.mkdir(exist_ok=True)
        with LOG.open("ab") as log:
            self.process = Program(["serve", *self.options], log, log)
        wait_for(self.answers, 120, f"the daemon does not answer: {log_tail()}")
        return self

    def answers(self):
        """Whether the control socket answers; a daemon that ended is a failure."""
        if self.process.poll() is not None:
            raise Failure(f"serve exited {self.process.returncode}: {log_tail()}")
        with socket.socket(socket.AF_UNIX) as control:  # a command of ours would take two seconds to import
            control.settimeout(60)
            try:
                control.connect(str(SOCKET))
                control.sendall(b"GET /v1/status HTTP/1.1\r\nHost: loader\r\nConnection: close\r\n\r\n")
                return control.recv(64).split(b" ")[1:2] == [b"200"]
            except OSError:
                return False

    def stop(self):
        """SIGTERM, and wait for its end."""
        expect(self.process.poll() is None, f"serve had ended before SIGTERM: {log_tail()}")
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait(30)

    def kill_all(self):
        """SIGKILL for every process of the daemon at once: a keeper would take its supervisor's place."""
        pids = [self.process.pid, *self.processes("loader.keeper"), *self.processes("loader.worker")]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        self.process.wait(30)

    def await_processes(self, what):
        """The same, once there are some."""
        wait_for(lambda: self.processes(what), 120, f"no {what} came back: {log_tail()}")
        return self.processes(what)

    def processes(self, what):
        """Pids of the daemon's processes whose command line has `what`."""
        return [pid for pid, line in command_lines() if what in line]


def command_lines():
    """(pid, command line) of every process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
            except OSError:
                continue  # it ended meanwhile
    return found


def log_tail(lines=15):
    """The end of the daemon's log."""
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-lines:]) if LOG.exists() else ""


def compare(target, digests):
    """Every file of `digests` has its bytes below `target`, and there is no other. Read by a process of its own."""
    found = digest_tree(target)
    expect(set(found) == set(digests), f"paths differ: {sorted(set(found) ^ set(digests))[:5]}")
    wrong = [path for path, digest in digests.items() if found[path] != digest]
    expect(not wrong, f"bytes differ in {len(wrong)} files: {wrong[:5]}")


def digest_tree(target):
    """Path → sha256 of every regular file below `target`."""
    found = {}
    for folder, _, names in os.walk(target):
        for name in names:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as stream:
                    found[str(path.relative_to(target))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def drop_caches():
    """Clean pages and inodes out of memory, so that what is read comes from the cache files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def mount_point(name):
    """An empty directory to mount on."""
    path = Path("/run/mnt") / name
    path.mkdir(parents=True, exist_ok=True)
    return path


class Readers:
    """Processes that read whole trees at the same time, each with an outcome of its own."""

    def __init__(self, targets, copies=2):
        self.jobs = []
        for target in targets:
            for _ in range(copies):
                self.jobs.append((target, *self._start(target)))

    def _start(self, target):
        receive, send = os.pipe()
        pid = os.fork()
        if pid:
            os.close(send)
            return pid, receive
        try:
            os.close(receive)
            data = json.dumps(digest_tree(target)).encode()
        except OSError as error:
            data = json.dumps({"error": str(error)}).encode()
        with os.fdopen(send, "wb") as stream:
            stream.write(data)
        os._exit(0)

    def running(self):
        """How many have not ended (their pipe is still open)."""
        ready, _, _ = select.select([receive for _, _, receive in self.jobs], [], [], 0)
        return len(self.jobs) - len(ready)

    def results(self, limit):
        """(target, path → digest) of each, or {"error": …}; a reader that does not end is a failure (and killed)."""
        deadline = time.monotonic() + limit
        found, stuck = [], []
        for target, pid, receive in self.jobs:
            if not select.select([receive], [], [], max(0.0, deadline - time.monotonic()))[0]:
                stuck.append((pid, Path(f"/proc/{pid}/stack").read_text() if DEBUG_STACKS else ""))
                os.kill(pid, signal.SIGKILL)
            with os.fdopen(receive, "rb") as stream:
                data = stream.read()
            os.waitpid(pid, 0)
            found.append((target, json.loads(data or b"{}")))
        expect(not stuck, f"{len(stuck)} readers are stuck after {limit} s: {stuck[:2]} {log_tail()}")
        return found


DEBUG_STACKS = Path("/proc/self/stack").exists()


def expect_right(found, images, errors_allowed=False):
    """Every reader saw exactly the image's bytes (or, if allowed, an I/O error: never other bytes)."""
    for target, digests in found:
        files = images[target.name]["files"]
        if "error" in digests:
            expect(errors_allowed, f"{target}: {digests['error']} {log_tail()}")
            continue
        wrong = [path for path in files if digests.get(path) != files[path]]
        expect(not wrong, f"{target}: wrong bytes in {len(wrong)} files: {wrong[:5]}")
