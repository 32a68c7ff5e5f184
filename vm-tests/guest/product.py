"""The product in the guest: the daemon started as a person would, its commands, and trees compared with digests."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from lib import DISK, Failure, expect, run, wait_for

ROOT = DISK / "loader"
SOCKET = Path("/run/erofs-loader/control.sock")
REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"EROFS_LOADER_ROOT": str(ROOT), "EROFS_LOADER_SOCKET": str(SOCKET), "PYTHONPATH": str(REPOSITORY)}
LOADER = [sys.executable, "-c", "import sys; from loader.cli.loader import main; sys.exit(main())"]
LOG = Path("/run/disk/serve.log")


def loader(*arguments, ok=True, limit=120):
    """One `erofs-loader` command; the finished process."""
    return run(*LOADER, *arguments, ok=ok, env=ENVIRONMENT, limit=limit)


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
            environment = {**os.environ, **ENVIRONMENT}
            command = [*LOADER, "serve", *self.options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_for(self.answers, 60, f"the daemon does not answer: {log_tail()}")
        return self

    def answers(self):
        """Whether `status` works; a daemon that ended is a failure."""
        if self.process.poll() is not None:
            raise Failure(f"serve exited {self.process.returncode}: {log_tail()}")
        return SOCKET.exists() and loader("status", ok=False).returncode == 0

    def stop(self):
        """SIGTERM, and wait for its end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            raise Failure(f"serve does not end after SIGTERM: {log_tail()}") from None

    def kill_all(self):
        """SIGKILL for every process of the daemon at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

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
