"""Other programs that do what ours do: found on PATH, in the cache, or told by variables.

NYDUS2_BIN    directory of nydus-image and nydusd 2.x (scripts/build-peers.sh builds them)
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
from pathlib import Path
from typing import Self

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


class Nydusd:
    """nydusd serving a bootstrap over FUSE at `mount_point`, blobs from a registry, an empty cache."""

    def __init__(self, bootstrap: Path, registry: str, repository: str, directory: Path) -> None:
        self.mount_point = directory / "mnt"
        self.mount_point.mkdir(parents=True)
        (directory / "cache").mkdir()
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
        with open(directory / "nydusd.log", "wb") as log:
            self._process = subprocess.Popen(
                [nydus2("nydusd"), "fuse", "--bootstrap", bootstrap, "--config", directory / "config.json",
                 "--mountpoint", self.mount_point, "--rlimit-nofile", "0", "--log-level", "warn"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.log = directory / "nydusd.log"

    def __enter__(self) -> Self:
        for _ in range(500):
            if os.path.ismount(self.mount_point):
                return self
            if self._process.poll() is not None:
                break
            time.sleep(0.01)
        self.__exit__()
        raise RuntimeError("nydusd does not start: " + self.log.read_text()[-2000:])

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["umount", "-l", self.mount_point], stderr=subprocess.DEVNULL)
        self._process.terminate()
        self._process.wait()
