"""Other programs that do what ours do: found on PATH, in the cache, or told by variables.

NYDUS2_BIN    directory of nydus-image and nydusd 2.x (scripts/build-peers.sh builds them)
NYDUS3_BIN    directory of nydus 3, where someone has one
EROFS_BIN     directory of mkfs.erofs 1.9
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from tests.images.cache import cache_root


class MissingPeer(Exception):
    """The program is not on this machine; the message says where it was looked for."""


def find(program: str, variable: str, cached: str) -> Path:
    """The path of a peer's program."""
    told = os.environ.get(variable)
    candidates = [Path(told) / program] if told else sorted(cache_root().glob(f"{cached}/{program}"))
    on_path = shutil.which(program)
    for candidate in [*candidates, *([Path(on_path)] if on_path and not told else [])]:
        if candidate.exists():
            return candidate
    raise MissingPeer(f"{program}: not in ${variable}, the cache or PATH")


def nydus2(program: str) -> Path:
    """nydus-image or nydusd of Nydus 2."""
    return find(program, "NYDUS2_BIN", "peers/nydus-2*/bin")


def nydus3() -> Path:
    """nydus of Nydus 3."""
    return find("nydus", "NYDUS3_BIN", "peers/nydus-3*/bin")


def mkfs_erofs() -> Path:
    """mkfs.erofs of erofs-utils 1.9."""
    return find("mkfs.erofs", "EROFS_BIN", "erofs-utils-*/bin")


class NydusImage:
    """A tree as nydus-image builds it with its defaults (RAFS v6, zstd, 1 MiB chunks): one bootstrap, one blob."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.bootstrap = directory, directory / "bootstrap"
        self.bootstrap_digest = ""  # once it lies in a registry

    @staticmethod
    def command(tree: Path, directory: Path) -> list[str | Path]:
        """What builds `tree` into `directory`, which must hold an empty directory `blobs`."""
        fixed = ["create", "-t", "dir-rafs", "--whiteout-spec", "none", "-l", "warn"]
        return [nydus2("nydus-image"), *fixed, "-B", directory / "bootstrap", "-D", directory / "blobs", tree]

    @classmethod
    def build(cls, tree: Path, directory: Path) -> NydusImage:
        """Build `tree` into `directory`, which is made anew."""
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "blobs").mkdir(parents=True)
        subprocess.run(cls.command(tree, directory), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return cls(directory)

    @property
    def blob(self) -> Path:
        """The data blob's file."""
        (blob,) = (self.directory / "blobs").iterdir()
        return blob

    def packed_bootstrap(self) -> bytes:
        """The bootstrap as it crosses the wire: gzip, as Nydus' images have it."""
        return subprocess.run(["gzip", "-c", self.bootstrap], check=True, capture_output=True).stdout


def push_blob(registry: str, repository: str, data: bytes) -> str:
    """Upload a blob to a registry of plain HTTP; returns its digest."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"http://{registry}/v2/{repository}/blobs/uploads/", method="POST")
    with urllib.request.urlopen(request) as answer:
        location = urllib.parse.urljoin(f"http://{registry}/", answer.headers["Location"])
    place = f"{location}{'&' if '?' in location else '?'}digest={digest}"
    upload = urllib.request.Request(place, data=data, method="PUT")
    upload.add_header("Content-Type", "application/octet-stream")
    urllib.request.urlopen(upload).close()
    return digest


class Nydus3Image:
    """A tree as `nydus build` makes it with its defaults (4 MiB groups, zstd): one bootstrap, one blob."""

    def __init__(self, tree: Path, directory: Path) -> None:
        (directory / "blobs").mkdir(parents=True)
        self.bootstrap = directory / "bootstrap"
        subprocess.run(
            [nydus3(), "build", "--blob-dir", directory / "blobs", "--bootstrap", self.bootstrap, "-l", "warn", tree],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (self.blob,) = (path for path in (directory / "blobs").iterdir() if "." not in path.name)
        self.bootstrap_digest = ""  # once it lies in a registry

    def packed_bootstrap(self) -> bytes:
        """The bootstrap as it crosses the wire: gzip."""
        return subprocess.run(["gzip", "-c", self.bootstrap], check=True, capture_output=True).stdout


class PeerMount:
    """A peer's daemon serving a mount at `directory`/mnt while the context is open."""

    def __init__(self, directory: Path, command: list[str | Path]) -> None:
        self.mount_point, self.log = directory / "mnt", directory / "daemon.log"
        self.command = command
        self.mount_point.mkdir(parents=True)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """The daemon."""
        return self._process.pid

    def __enter__(self) -> Self:
        for _ in range(500):
            if self.mount_point.is_mount():
                return self
            if self._process.poll() is not None:
                break
            time.sleep(0.01)
        self.__exit__()
        raise RuntimeError("the peer does not start: " + self.log.read_text()[-2000:])

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["umount", "-l", self.mount_point], stderr=subprocess.DEVNULL)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def nydus2_mount(bootstrap: Path, registry: str, repository: str, directory: Path) -> PeerMount:
    """nydusd serving a bootstrap over FUSE, blobs from a registry, an empty cache."""
    (directory / "cache").mkdir(parents=True)
    config = {
        "device": {
            "backend": {"type": "registry", "config": {"scheme": "http", "host": registry, "repo": repository}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(directory / "cache")}},
        },
        "mode": "direct",
        "digest_validate": False,
        "enable_xattr": True,
        "fs_prefetch": {"enable": False},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return PeerMount(directory, nydus2_command(bootstrap, directory))


def nydus2_command(bootstrap: Path, directory: Path) -> list[str | Path]:
    """What serves `bootstrap` at `directory`/mnt."""
    fixed: list[str | Path] = ["--rlimit-nofile", "0", "--log-level", "warn", "--mountpoint", directory / "mnt"]
    return [nydus2("nydusd"), "fuse", "--bootstrap", bootstrap, "--config", directory / "config.json", *fixed]


def nydus3_mount(bootstrap: Path, registry: str, repository: str, directory: Path) -> PeerMount:
    """`nydus fanotify` serving a bootstrap, blobs from a registry, an empty cache, no prefetch."""
    (directory / "cache").mkdir(parents=True)
    config = {
        "backend": {"type": "registry", "config": {"host": registry, "repo": repository, "insecure": True}},
        "cache": {"type": "local", "config": {"dir": str(directory / "cache")}},
        "prefetch": {"enable": False},
    }
    (directory / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return PeerMount(directory, nydus3_command(bootstrap, directory))


def nydus3_command(bootstrap: Path, directory: Path) -> list[str | Path]:
    """What serves `bootstrap` at `directory`/mnt."""
    fixed: list[str | Path] = ["--config", directory / "config.yaml", "--mountpoint", directory / "mnt"]
    return [nydus3(), "fanotify", "--bootstrap", bootstrap, *fixed]


class NydusBuilt(NamedTuple):
    """An image that a version of Nydus built, and what mounts it: bootstrap, registry, repository, directory."""

    name: str
    title: str
    image: NydusImage | Nydus3Image
    mount: Callable[[Path, str, str, Path], PeerMount]


def nydus_builds(tree: Path, scratch: Path, notes: list[str]) -> Iterator[NydusBuilt]:
    """`tree` as built by each version that is here; `notes` gets a line for one that is not."""
    builders: list[tuple[str, str, Callable[[], NydusImage | Nydus3Image], Callable[..., PeerMount]]] = [
        ("nydus2", "Nydus 2", lambda: NydusImage.build(tree, scratch / "nydus2"), nydus2_mount),
        ("nydus3", "Nydus 3", lambda: Nydus3Image(tree, scratch / "nydus3"), nydus3_mount),
    ]
    for name, title, build, mount in builders:
        try:
            yield NydusBuilt(name, title, build(), mount)
        except MissingPeer as missing:
            notes.append(str(missing))
