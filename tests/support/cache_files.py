"""Cache files without a kernel: a blob of frames, its data file in a temporary directory, a source in memory."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from erofs_builder.digest import Digest
from erofs_builder.frames import FrameTable
from erofs_builder.payload import Form
from loader.cache.files import CacheFile, prepare_blob
from loader.cache.layout import Layout
from loader.cache.ready import ReadyMap
from loader.cache.writer import BufferedWriter
from loader.registry.base import Descriptor
from tests.support.sample_blobs import SampleBlob


def sample(frames: int = 12) -> SampleBlob:
    """A blob of frames of one block each way or so, all different."""
    blob = SampleBlob()
    for number in range(frames):
        blob.add_frames(os.urandom(3000) + bytes((number % 256,)) * 5192, 8192)
    blob.finish()
    return blob


def open_file(root: Path, blob: SampleBlob, form: Form) -> CacheFile:
    """The blob's cache file in a fresh or an existing cache below `root`."""
    layout = Layout(root)
    layout.prepare()
    table = table_of(blob)
    data = prepare_blob(layout, form, table)
    ready = ReadyMap(layout.blob(table.blob_digest, form), len(table), layout.tmp, table=table.identity)
    file = CacheFile(f"{form.value}/{table.blob_digest.hex}", form, table, ready, trusted=True)
    file.writer, file.object = BufferedWriter(os.open(data, os.O_RDWR | os.O_CLOEXEC)), 1
    return file


def table_of(blob: SampleBlob) -> FrameTable:
    assert blob.blob.table is not None
    return blob.blob.table


@dataclass
class MemorySource:
    """An ImageSource of blobs in memory. `before` runs ahead of each range and may raise."""

    blobs: dict[Digest, bytes]
    before: Callable[[Digest, int, int], None] = lambda digest, offset, length: None
    spoil: Callable[[bytes], bytes] = lambda data: data
    ranges: list[tuple[int, int]] = field(default_factory=list)
    delay: float = 0.0
    most_at_once: int = 0
    _at_once: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        with self._lock:
            self.ranges.append((offset, length))
            self._at_once["ranges"] += 1
            self.most_at_once = max(self.most_at_once, self._at_once["ranges"])
        try:
            if self.delay:
                time.sleep(self.delay)
            self.before(digest, offset, length)
            return self.spoil(self.blobs[digest][offset : offset + length])
        finally:
            with self._lock:
                self._at_once["ranges"] -= 1

    def resolve(self, reference: str) -> Descriptor:
        raise NotImplementedError

    def manifest(self, descriptor: Descriptor) -> bytes:
        raise NotImplementedError

    def blob(self, descriptor: Descriptor) -> bytes:
        return self.blobs[descriptor.digest]

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        raise NotImplementedError

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        return []

    def close(self) -> None:
        pass
