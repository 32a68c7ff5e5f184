"""The image cache: ${XDG_CACHE_HOME:-~/.cache}/erofs-ondemand/images/NAME-KEY, the key over the scripts that make it.

An image is built in a scratch directory next to its place and renamed into it, under a lock, so an aborted build
leaves nothing that looks whole and two test runs build once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_root() -> Path:
    """The directory of everything that tests and benches keep between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "erofs-ondemand"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created when missing)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def script_key(*scripts: str) -> str:
    """Twelve hex digits over the bytes of the scripts (paths), in order."""
    digest = hashlib.sha256()
    for script in scripts:
        digest.update(Path(script).read_bytes())
    return digest.hexdigest()[:12]


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory of image `name`; `build(directory)` makes it if it is not there."""
    root = cache_root() / "images"
    place = root / f"{name}-{key}"
    if place.is_dir():
        return place
    with lock(root / f".{name}.lock"):
        if place.is_dir():
            return place
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            build(scratch)
            scratch.chmod(0o755)
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _forget_older(root, name, place)
    return place


def _forget_older(root: Path, name: str, place: Path) -> None:
    # A changed script leaves the image of the old one behind: half a gigabyte each.
    for other in root.glob(f"{name}-*"):
        if other != place and len(other.name) == len(place.name):
            shutil.rmtree(other, ignore_errors=True)
