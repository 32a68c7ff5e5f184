"""The canary: a tiny image that is mounted lazily and read by another process, to see what this kernel really does."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from erofs_builder.blob import BlobWriter
from erofs_builder.erofs.sharing import announce_fingerprints
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.fingerprint import fingerprint
from erofs_builder.frames import BLOCK
from erofs_builder.model import Blob, Extent, Node
from erofs_builder.payload import Form, device_tag

FSID = "erofs-ondemand-canary"
PATIENCE = 60.0  # seconds for one reader; an emulated machine is slow
_FRAME = 32 * BLOCK
_FEATHERS = bytes(b"canary"[number % 6] for number in range(256))  # what compresses
_READER = "cat"  # not this process: it would wait for itself


class CanaryFailed(Exception):
    """A canary did not live. `step` is what failed; `error` the kernel's answer, where it gave one."""

    def __init__(self, step: str, message: str, error: OSError | None = None) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.error = error


@dataclass(frozen=True, slots=True)
class CanaryImage:
    """An image in one form: metadata and blob as the kernel sees them, and what its files must read as."""

    form: Form
    metadata: bytes
    announced: bytes  # the same with its fingerprints announced, for kernels that share page cache
    tag: str
    data: bytes
    files: dict[str, bytes]

    @classmethod
    def make(cls, form: Form) -> CanaryImage:
        """The same image every time: a file of several frames, and a small one in the packed inode."""
        rng = random.Random("canary")
        large = rng.randbytes(_FRAME) + rng.randbytes(_FRAME).translate(_FEATHERS)
        small = b"the canary lives\n"
        out = io.BytesIO()
        with BlobWriter(out, threads=1) as writer:
            frames = [large[:_FRAME], large[_FRAME:], small + bytes(2 * BLOCK - len(small))]
            for frame in frames:
                writer.add(frame)
            blob = Blob(writer.finish())
        nodes = {
            b"large": _file(large, Extent(blob, 0, 0, _FRAME), Extent(blob, 1, 0, _FRAME)),
            b"small": _file(small, Extent(blob, 2, 0, len(small))),
        }
        metadata = write_metadata(Node(mode=0o040755, children=nodes), form, [blob])
        data = out.getvalue() if form is Form.ENCODED else b"".join(frames)
        announced = announce_fingerprints(metadata.erofs) + metadata.erofs[BLOCK:]
        files = {"large": large, "small": small}
        return cls(form, metadata.erofs, announced, device_tag(form, blob.digest), data, files)

    @property
    def options(self) -> list[str]:
        return mount_options(self.form)


def mount_options(form: Form) -> list[str]:
    """What a mount of this form needs: the kernel's own cache of compressed pages would keep failed reads."""
    return ["cache_strategy=disabled"] if form is Form.ENCODED else []


def _file(content: bytes, *extents: Extent) -> Node:
    known = fingerprint([(len(content), hashlib.sha256(content).digest())])
    return Node(mode=0o100644, size=len(content), extents=extents, fingerprint=known)


def check_reads(image: CanaryImage, target: Path, serve: Callable[[bool], bool]) -> None:
    """Read the mounted image from other processes: refused first, which must be an error, then served.

    `serve(refuse)` does what the kernel has asked for, and says whether it asked for anything.
    """
    asked, failed, _ = _read(target / "large", serve, refuse=True)
    if not asked:
        raise CanaryFailed("read", "the kernel read a file that is not there without asking")
    if not failed:
        raise CanaryFailed("read", "a refused read gave data")
    for name, content in image.files.items():
        _, failed, found = _read(target / name, serve, refuse=False)
        if failed or found != content:
            raise CanaryFailed("read", f"{name}: " + ("an error, though it was served" if failed else "wrong bytes"))


def check_sharing(image: CanaryImage, targets: tuple[Path, Path, Path], serve: Callable[[bool], bool]) -> None:
    """Read through the first of three mounts: the second, of its domain, must have the pages, the third must not."""
    first, second, other = targets
    for name, content in image.files.items():
        _, failed, found = _read(first / name, serve, refuse=False)
        if failed or found != content:
            raise CanaryFailed("share", f"{name}: " + ("an error, though it was served" if failed else "wrong bytes"))
        asked, failed, found = _read(second / name, serve, refuse=True)
        if asked or failed:
            raise CanaryFailed("share", "the kernel keeps the pages of each image to itself")
        if found != content:
            raise CanaryFailed("share", f"{name}: wrong bytes from the pages of another image")
    asked, failed, _ = _read(other / "large", serve, refuse=True)
    if not asked or not failed:
        raise CanaryFailed("share", "the kernel shares pages with another domain")


def _read(path: Path, serve: Callable[[bool], bool], *, refuse: bool) -> tuple[bool, bool, bytes]:
    """Whether the kernel asked, whether the reader failed, and what it read."""
    asked = False
    with _spooled() as output:
        with subprocess.Popen([_READER, str(path)], stdout=output, stderr=subprocess.DEVNULL) as reader:
            until = time.monotonic() + PATIENCE
            while True:
                asked |= serve(refuse)
                if reader.poll() is not None:
                    break
                if time.monotonic() > until:
                    reader.kill()
                    raise CanaryFailed("read", f"{path.name}: no end after {PATIENCE:.0f} s")
        os.lseek(output, 0, os.SEEK_SET)
        with open(os.dup(output), "rb") as file:
            return asked, reader.returncode != 0, file.read()


@contextlib.contextmanager
def _spooled() -> Iterator[int]:
    fd = os.memfd_create("erofs-loader-canary", os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Turn the kernel's refusal into the failure of a step."""
    try:
        yield
    except OSError as error:
        raise CanaryFailed(name, error.strerror or str(error), error) from None
