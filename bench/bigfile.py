"""An image of one large file, 500 MB of Debian layers, and what its blob is like for who reads that plainly."""

from __future__ import annotations

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
REPOSITORY = "big"
NAME = "data"
_CHUNK = 1 << 20


class BigFile(NamedTuple):
    """The file `NAME` of the image REPOSITORY:1. Its only blob decodes to it, padded; `table` has the blob's frames."""

    table: FrameTable

    def url(self, registry: str) -> str:
        """Where the blob is."""
        return f"http://{registry}/v2/{REPOSITORY}/blobs/{self.table.blob_digest}"

    def reference(self, registry: str) -> str:
        return f"docker://{registry}/{REPOSITORY}:1"


def _write_file(path: Path) -> None:
    """The layers of the Debian image, one behind the other."""
    layout = Layout(catalog.image("debian-plain") / "oci")
    with open(path, "wb") as data:
        for layer in layout.manifest("latest")["layers"]:
            with open(layout.blob_path(layer["digest"]), "rb") as tar:
                while (left := SIZE - data.tell()) and (block := tar.read(min(_CHUNK, left))):
                    data.write(block)


def publish(registry: str, scratch: Path) -> BigFile:
    """Make the image and put it into a registry of plain HTTP."""
    tree = scratch / "tree"
    tree.mkdir()
    _write_file(tree / NAME)
    run(BUILDER, "convert", "--insecure", f"rootfs:{tree}", f"docker://{registry}/{REPOSITORY}:1")
    (tree / NAME).unlink()
    source = open_image(f"docker://{registry}/{REPOSITORY}:1", RegistryConfig(insecure=True))[0]
    try:
        metadata = find_artifact(source, "1")[1].metadata[Form.ENCODED]
        payload = decode_payload(zstandard.ZstdDecompressor().decompress(source.blob(metadata)))
    finally:
        source.close()
    (table,) = payload.tables
    return BigFile(table)
