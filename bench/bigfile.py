"""Images of one large file, 500 MB of Debian layers or a database; what their blobs are for who reads those plainly."""

from __future__ import annotations

import contextlib
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from bench.demo import run
from bench.node import BUILDER
from erofs_builder.frames import FrameTable
from erofs_builder.payload import Form, decode_payload
from loader.registry.config import RegistryConfig
from loader.registry.find import find_artifact
from loader.registry.open import open_image
from tests.images import catalog
from tests.images.layout import Layout

SIZE = 500_000_000
REPOSITORY, DATABASE = "big", "database"
NAME = "data"
_CHUNK = 1 << 20
_MAX_ROW = 64 << 10


class BigFile(NamedTuple):
    """The file `NAME`, `size` bytes, of the image `repository`:1. Its only blob decodes to it, padded; `table` has the
    blob's frames."""

    repository: str
    size: int
    table: FrameTable

    def url(self, registry: str) -> str:
        """Where the blob is."""
        return f"http://{registry}/v2/{self.repository}/blobs/{self.table.blob_digest}"

    def reference(self, registry: str) -> str:
        return f"docker://{registry}/{self.repository}:1"


def _layers() -> Iterator[Path]:
    """The plain layers of the Debian image."""
    layout = Layout(catalog.image("debian-plain") / "oci")
    for layer in layout.manifest("latest")["layers"]:
        yield layout.blob_path(layer["digest"])


def _write_layers(path: Path) -> None:
    """The layers, one behind the other."""
    with open(path, "wb") as data:
        for layer in _layers():
            with open(layer, "rb") as tar:
                while (left := SIZE - data.tell()) and (block := tar.read(min(_CHUNK, left))):
                    data.write(block)


def _write_database(path: Path) -> None:
    """An SQLite database of the layers' files of up to 64 KiB, 120 MB."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE files (path TEXT PRIMARY KEY, mode INTEGER, mtime INTEGER, content BLOB)")
        for layer in _layers():
            with tarfile.open(layer) as tar:
                for entry in tar:
                    if entry.isreg() and entry.size <= _MAX_ROW and (content := tar.extractfile(entry)) is not None:
                        row = (entry.name, entry.mode, entry.mtime, content.read())
                        database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", row)


def publish(registry: str, scratch: Path) -> BigFile:
    """Make the image of 500 MB and put it into a registry of plain HTTP."""
    return _publish(registry, scratch, REPOSITORY, _write_layers)


def publish_database(registry: str, scratch: Path) -> BigFile:
    """The same with a database."""
    return _publish(registry, scratch, DATABASE, _write_database)


def _publish(registry: str, scratch: Path, repository: str, write: Callable[[Path], None]) -> BigFile:
    tree = scratch / repository
    tree.mkdir()
    write(tree / NAME)
    size = (tree / NAME).stat().st_size
    run(BUILDER, "convert", "--insecure", f"rootfs:{tree}", f"docker://{registry}/{repository}:1")
    (tree / NAME).unlink()
    source = open_image(f"docker://{registry}/{repository}:1", RegistryConfig(insecure=True))[0]
    try:
        metadata = find_artifact(source, "1")[1].metadata[Form.ENCODED]
        payload = decode_payload(zstandard.ZstdDecompressor().decompress(source.blob(metadata)))
    finally:
        source.close()
    (table,) = payload.tables
    return BigFile(repository, size, table)
