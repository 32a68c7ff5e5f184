"""A daemon of supervisor, keeper and fill workers in processes of their own, for tests to read from and to kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erofs_builder.erofs.writer import write_metadata
from erofs_builder.model import Blob, Node
from erofs_builder.payload import Form
from loader.keeper.config import KeeperConfig
from mounts import mountinfo, umount2
from mounts.syscalls import MNT_DETACH
from tests.support.sample_blobs import SampleBlob

REPOSITORY = Path(__file__).parent.parent.parent
WORKER = (sys.executable, str(REPOSITORY / "tests/support/fill_worker.py"))
PATIENCE = 60.0

SERVE = """
import logging, sys
from loader.keeper.config import KeeperConfig
from loader.keeper.supervisor import run
logging.basicConfig(format="supervisor: %(message)s", level=logging.INFO)
sys.exit(run(KeeperConfig.from_json(sys.argv[1])))
"""

# Reads every file of a tree in its own order; prints each file's digest, or its errno.
READER = """
import hashlib, os, random, sys
root, seed = sys.argv[1], int(sys.argv[2])
names = sorted(os.listdir(root))
random.Random(seed).shuffle(names)
for name in names:
    digest = hashlib.sha256()
    try:
        fd = os.open(os.path.join(root, name), os.O_RDONLY)
        size = os.fstat(fd).st_size
        pieces = list(range(0, size, 65536))
        random.Random(seed).shuffle(pieces)
        parts = {}
        for offset in pieces:
            data = os.pread(fd, 65536, offset)
            assert len(data) == min(65536, size - offset), (name, offset, len(data))
            parts[offset] = data
        for offset in sorted(parts):
            digest.update(parts[offset])
        print(name, digest.hexdigest(), flush=True)
        os.close(fd)
    except OSError as error:
        print(name, "errno", error.errno, flush=True)
"""


@dataclass
class Image:
    """A sample image in one form: its metadata file, its data files, and the digests of its files."""

    form: Form
    metadata: Path
    data: list[Path]
    files: dict[str, str] = field(default_factory=dict)


def make_image(directory: Path, form: Form, *, seed: int = 1, blobs: int = 2, large: int = 6, small: int = 40) -> Image:
    """Files that do and that do not compress, large ones in frames of their own, small ones packed."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    root = Node(mode=0o040755, children={})
    image = Image(form, directory / "metadata", [])
    assert root.children is not None
    finished: list[Blob] = []
    by_blob: dict[int, SampleBlob] = {}
    for number in range(blobs):
        sample = SampleBlob()
        for index in range(large + small):
            size = rng.randrange(300_000, 1_500_000) if index < large else rng.randrange(1, 20_000)
            content = (
                rng.randbytes(size) if index % 2 else bytes(rng.choice(b"abcdefgh") for _ in range(1 + size // 8)) * 8
            )
            content = content[:size]
            extents = sample.add_frames(content) if index < large else sample.add_packed(content)
            name = f"blob{number}-file{index}"
            root.children[name.encode()] = Node(mode=0o100644, size=size, extents=extents)
            image.files[name] = hashlib.sha256(content).hexdigest()
        finished.append(sample.finish())
        by_blob[id(finished[-1])] = sample
    metadata = write_metadata(root, form, finished)
    image.metadata.write_bytes(metadata.erofs)
    for blob in metadata.blobs:
        sample = by_blob[id(blob)]
        path = directory / blob.digest.hex
        path.write_bytes(sample.encoded if form is Form.ENCODED else sample.decoded)
        image.data.append(path)
    return image


class Daemon:
    """`erofs-loader serve` without the loader: its root is `directory`/root."""

    def __init__(
        self, directory: Path, *, delay: float = 0.0, worker: tuple[str, ...] = WORKER, **settings: Any
    ) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.source = directory / "source"
        self.source.mkdir(exist_ok=True)
        self.log = directory / "daemon.log"
        environment = {"FILL_SOURCE": str(self.source), "FILL_DELAY": str(delay), "PYTHONPATH": str(REPOSITORY)}
        self.config = KeeperConfig(
            root=self.root,
            socket=self.root / "control.sock",
            worker=worker,
            worker_env=environment,
            **settings,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until a worker answers."""
        self.start_process()
        self.call("status")

    def start_process(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, self.config.to_json()], cwd=REPOSITORY, stdout=log, stderr=log
            )

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A call of the keeper, through whichever worker serves; asked again when that worker dies."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(PATIENCE)
                    connection.connect(str(self.config.socket))
                    connection.sendall(json.dumps({"call": name} | arguments).encode())
                    parts = b""
                    while part := connection.recv(65536):
                        parts += part
                if parts:
                    answer: dict[str, Any] = json.loads(parts)
                    return answer
            except OSError:
                pass
            if time.monotonic() > until:
                raise AssertionError(f"no answer to {name}:\n{self.log.read_text()}")
            time.sleep(0.02)

    def pids(self) -> tuple[int, int]:
        """The pids of keeper and worker."""
        answer = self.call("pid")
        return int(answer["keeper"]), int(answer["pid"])

    def cache_files(self, image: Image) -> list[Path]:
        return [self.root / "blobs" / f"{path.name}.{image.form.value}" for path in image.data]

    def mount(self, image: Image, target: Path, pause: float = 0.0) -> list[int]:
        """Make the image's cache files, empty, and mount them; the numbers of their objects."""
        objects = []
        target.mkdir(exist_ok=True)
        metadata = self.root / "images" / image.form.value
        for directory in (self.root / "blobs", metadata.parent):
            directory.mkdir(exist_ok=True)
        metadata.write_bytes(image.metadata.read_bytes())
        for path, cached in zip(image.data, self.cache_files(image), strict=True):
            link = self.source / path.name
            if not link.exists():
                link.symlink_to(path)
            size = path.stat().st_size
            cached.touch()
            if cached.stat().st_size == 0:
                os.truncate(cached, size + -size % 65536)
            created = self.call("create", name=path.name, path=str(cached), form=image.form.value, size=size)
            assert created["errno"] == 0, created
            objects.append(int(created["object"]))
        options = ["cache_strategy=disabled"] if image.form is Form.ENCODED else []
        devices = [str(path) for path in self.cache_files(image)]
        mounted = self.call(
            "mount", source=str(metadata), devices=devices, options=options, target=str(target), objects=objects,
            pause=pause,
        )  # fmt: skip
        assert mounted["errno"] == 0, mounted
        return objects

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill_all(self) -> None:
        """SIGKILL to every process of the daemon at once."""
        assert self.process is not None
        pids = [*daemon_pids(self.root), self.process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not daemon_pids(self.root))

    def close(self) -> None:
        """Leave nothing: processes, mounts."""
        for mount in mountinfo("erofs"):
            if Path(mount.target).is_relative_to(self.directory):
                umount2(mount.target, MNT_DETACH)
        if self.process is not None:  # else it would start one more keeper, which takes its place
            self.process.send_signal(signal.SIGSTOP)
        while pids := daemon_pids(self.root):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def daemon_pids(root: Path) -> list[int]:
    """Keepers and workers of a root, by their environment."""
    wanted = f"EROFS_LOADER_ROOT={root}\0".encode(), f'"root": "{root}"'.encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z" and any(text in environment for text in wanted):
                found.append(int(entry.name))
    return found


def start_reader(target: Path, seed: int = 1) -> subprocess.Popen[str]:
    """A process that reads every file of a mount."""
    return subprocess.Popen([sys.executable, "-c", READER, str(target), str(seed)], stdout=subprocess.PIPE, text=True)


def results(reader: subprocess.Popen[str], timeout: float = PATIENCE) -> dict[str, str]:
    """What a reader found: digests, or `errno N`. A reader that is stuck fails the test."""
    try:
        output, _ = reader.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        reader.kill()
        reader.communicate()
        raise AssertionError(f"reader {reader.pid} is stuck") from None
    assert reader.returncode == 0
    return dict(line.split(" ", 1) for line in output.splitlines())


def wait_until(condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout} s in vain")
        time.sleep(0.02)
