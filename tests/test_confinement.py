"""What a worker may not do: each is tried, in a process that confined itself as a worker does, and in a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loader.cache.layout import Layout
from tests.support.daemon import Daemon

pytestmark = pytest.mark.root
REPOSITORY = Path(__file__).parent.parent

# Runs in a confined process: ROOT is its cache, OUTSIDE a directory next to it, PARENT an unconfined process.
_PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, threading
from pathlib import Path
from loader.cache.layout import Layout
from loader.worker.confinement import confine
ROOT, OUTSIDE, PARENT = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
print(*confine(Layout(ROOT).writable()))
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""

FORBIDDEN = {
    "write a file of root": "open(OUTSIDE / 'file', 'w')",
    "append to a file of root": "open(OUTSIDE / 'file', 'a')",
    "truncate a file of root": "os.truncate(OUTSIDE / 'file', 0)",
    "make a file": "open(OUTSIDE / 'new', 'x')",
    "remove a file of root": "os.unlink(OUTSIDE / 'file')",
    "change a sysctl": "open('/proc/sys/kernel/core_pattern', 'w')",
    "write the keeper's records": "open(ROOT / 'keeper.json', 'w')",
    "replace the keeper's records": "(ROOT / 'tmp/x').touch(); os.rename(ROOT / 'tmp/x', ROOT / 'keeper.json')",
    "make a symlink": "os.symlink('/etc', ROOT / 'blobs/link')",
    "link a file of root into the cache": "os.link(OUTSIDE / 'file', ROOT / 'blobs/file')",
    "make a device": "os.mknod(ROOT / 'blobs/null', 0o20600, os.makedev(1, 3))",
    "change a mode": "os.chmod(OUTSIDE / 'file', 0o4777)",
    "change a mode by descriptor": "os.fchmod(os.open(OUTSIDE / 'file', os.O_RDONLY), 0o4777)",
    "change an owner": "os.chown(OUTSIDE / 'file', 1, 1)",
    "set an attribute": "os.setxattr(OUTSIDE / 'file', 'user.x', b'x')",
    "read what root may read by capability only": "open(OUTSIDE / 'theirs').read()",
    "mount": "call(165, b'none', str(ROOT / 'tmp').encode(), b'tmpfs', 0, None)",
    "open a file system": "call(430, b'tmpfs', 0)",
    "unmount": "call(166, str(ROOT).encode(), 2)",
    "make a fanotify group": "call(300, 8, 0)",
    "make a namespace": "call(272, 0x20000)",
    "make a namespace by clone": "call(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "use io_uring": "call(425, 8, 0)",
    "load a BPF program": "call(321, 0, 0, 0)",
    "load a module": "call(313, 0, b'', 0)",
    "trace the parent": "call(101, 16, PARENT, 0, 0)",
    "read the parent's memory": "open(f'/proc/{PARENT}/mem', 'rb')",
    "take a descriptor of the parent": "call(438, os.pidfd_open(PARENT), 0, 0)",
    "signal the parent": "os.kill(PARENT, 0)",
    "limit the parent": "call(302, PARENT, 7, 0, 0)",
    "open a Unix socket": "socket.socket(socket.AF_UNIX)",
    "open a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "open a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "open a packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "make a pair of Unix datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "become somebody": "os.setuid(1)",
    "set the clock": "call(164, b'', 0)",
    "change the root": "os.chroot(ROOT)",
    "gain by executing": "subprocess.run(['chown', '1:1', OUTSIDE / 'file'], check=True)",
}

ALLOWED = {
    "write in the cache": "(ROOT / 'blobs/encoded').mkdir(); (ROOT / 'blobs/encoded/x').write_bytes(b'x')",
    "rename inside of the cache": "(ROOT / 'tmp/y').write_bytes(b'y'); os.rename(ROOT / 'tmp/y', ROOT / 'images/y')",
    "remove from the cache": "(ROOT / 'tmp/z').touch(); (ROOT / 'tmp/z').unlink()",
    "write what is open": "os.pwrite(200, b'written', 0); os.ftruncate(200, 4096)",
    "connect to the network": "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())",
    "resolve names": "socket.getaddrinfo('localhost', 80)",
    "start threads": "t = threading.Thread(target=print); t.start(); t.join()",
    "run a helper": "assert subprocess.run(['cat'], input=b'x', capture_output=True, check=True).stdout == b'x'",
    "use SQLite": "import sqlite3; d = sqlite3.connect(ROOT / 'records/state.db');"
    " d.execute('PRAGMA journal_mode = WAL'); d.execute('CREATE TABLE t (x)'); d.commit()",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Layout(tmp_path / "root").prepare()
    (tmp_path / "root/keeper.json").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (outside / "theirs").write_text("secret")
    os.chown(outside / "theirs", 1000, 1000)
    (outside / "theirs").chmod(0o600)
    return tmp_path / "root"


def confined(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    outside = root.parent / "outside"
    held = os.open(root / "blobs/held", os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(held, 200)
    try:
        command = [sys.executable, "-c", f"{_PRELUDE}\n{code}", str(root), str(outside), str(os.getpid())]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, pass_fds=(200,), timeout=60)
    finally:
        os.close(200)
        os.close(held)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden(root: Path, what: str) -> None:
    attempt = (
        f"try:\n    {FORBIDDEN[what]}\nexcept (OSError, subprocess.CalledProcessError) as e:\n    print('refused', e)"
    )
    done = confined(root, attempt)
    assert done.returncode == 0, done.stderr
    assert "\nrefused" in done.stdout, done.stdout
    assert (root.parent / "outside/file").read_text() == "precious"


@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(root: Path, what: str) -> None:
    done = confined(root, ALLOWED[what])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 True ")


def test_a_worker_is_confined(tmp_path: Path) -> None:
    with Daemon(tmp_path / "d") as daemon:
        status = daemon.command("status")
        assert status["confinement"]["capabilities"] == 0
        assert status["confinement"]["seccomp"] is True
        text = Path(f"/proc/{status['worker']['pid']}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert {facts[name] for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
        ranks = [Path(f"/proc/{status[name]['pid']}/oom_score_adj").read_text() for name in ("worker", "keeper")]
        assert int(ranks[0]) > int(ranks[1])


def test_the_keeper_has_no_parser() -> None:
    """Nothing in the processes that hold the kernel's descriptors can read an image, a registry's answer or HTTP."""
    code = "import sys, loader.keeper.__main__, loader.keeper.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"zstandard", "urllib3", "http", "ssl", "sqlite3", "tarfile", "isal", "loader.registry"}
    assert not [name for name in loaded if name.startswith(("erofs_builder", "loader.worker", "loader.cache"))]


def test_directories_and_sockets_are_roots_own(tmp_path: Path) -> None:
    os.umask(0o022)
    with Daemon(tmp_path / "d") as daemon:
        for path in (daemon.root, *Layout(daemon.root).writable()):
            assert path.stat().st_mode & 0o777 == 0o700, path
        assert daemon.socket.stat().st_mode & 0o777 == 0o600
        for path in [path for path in daemon.root.rglob("*") if path.is_file()]:
            assert not path.stat().st_mode & 0o022, path
