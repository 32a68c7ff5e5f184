"""What this machine can do at all, in MB/s: nothing that is measured here can be faster than its slowest part."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard

from bench.node import drop_caches
from tests.images import catalog
from tests.images.layout import Layout

SIZE = 64 << 20
ROUNDS = 3
DISK_SIZE = 512 << 20


def limits() -> dict[str, float]:
    """MB/s by name: the best of some rounds for the processor, one stream each for the disk."""
    data = _sample()
    packed = zstandard.ZstdCompressor(level=3).compress(data)
    found = {
        "sha256, one processor": _best(lambda: hashlib.sha256(data).digest()),
        "zstd -3, one processor": _best(lambda: zstandard.ZstdCompressor(level=3).compress(data)),
        "zstd -d, one processor": _best(lambda: zstandard.ZstdDecompressor().decompress(packed)),
    }
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        found["disk, written and synced"], found["disk, read"] = _disk(Path(name) / "file")
    return {name: round(value) for name, value in found.items()}


def _sample() -> bytes:
    """The beginning of the Debian image's layer."""
    layout = Layout(catalog.image("debian-plain") / "oci")
    layer = layout.manifest("latest")["layers"][0]
    with open(layout.blob_path(layer["digest"]), "rb") as tar:
        return tar.read(SIZE)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.monotonic()
        work()
        seconds.append(time.monotonic() - begin)
    return SIZE / min(seconds) / 1e6


def _disk(file: Path) -> tuple[float, float]:
    block = os.urandom(1 << 20)
    begin = time.monotonic()
    with file.open("wb") as stream:
        for _ in range(DISK_SIZE >> 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    wrote = time.monotonic() - begin
    drop_caches()
    begin = time.monotonic()
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 20):
            pass
    return DISK_SIZE / wrote / 1e6, DISK_SIZE / (time.monotonic() - begin) / 1e6
