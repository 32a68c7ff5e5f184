"""A small converted image taken apart, and ways to change a structure of it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.format_reader import (
    BLOB_TYPE,
    BLOCK,
    CONTENTS_TYPE,
    ENCODED,
    PAYLOAD_TYPES,
    Artifact,
    Layout,
    crc32c,
    decompress,
    parse_frame_table,
    read_artifact,
)
from tests.support.oracles import BUILDER, run

Change = Callable[[bytearray], None]
NOISE = hashlib.shake_128(b"noise").digest(1_500_000)


def put(layout: str, offset: int, *values: int) -> Change:
    """A change that packs `values` at `offset`, counted from the end where negative."""

    def change(data: bytearray) -> None:
        struct.pack_into(layout, data, offset if offset >= 0 else len(data) + offset, *values)

    return change


def flip(offset: int, bits: int = 1) -> Change:
    """A change of one byte."""

    def change(data: bytearray) -> None:
        data[offset] ^= bits

    return change


def changed(data: bytes, change: Change, seal: bool = False) -> bytes:
    """`data` after `change`; `seal` makes the CRC-32C in its last four bytes right again."""
    copy = bytearray(data)
    change(copy)
    if seal:
        copy[-4:] = struct.pack("<I", crc32c(bytes(copy[:-4])))
    return bytes(copy)


@dataclass(frozen=True)
class Image:
    """A small converted image."""

    layout: Path
    artifact: Artifact
    payloads: dict[int, bytes]
    tables: list[bytes]
    contents: bytes
    blob: bytes


def make_image(root: Path) -> Image:
    """Make a tree at `root` and convert it."""
    (root / "directory").mkdir(parents=True)
    (root / "directory" / "a").write_bytes(b"small")
    (root / "directory" / "b").write_bytes(b"other")
    (root / "directory" / "link").hardlink_to(root / "directory" / "a")
    (root / "noise").write_bytes(NOISE[: 300 * BLOCK])
    (root / "tail").write_bytes(NOISE)
    with open(root / "sparse", "wb") as file:
        file.truncate(5 * BLOCK + 1)
    (root / "symlink").symlink_to("noise")
    layout = root.parent / "out"
    run(BUILDER, "convert", f"rootfs:{root}", f"oci:{layout}:latest")
    opened = Layout(layout)
    layers = {layer["mediaType"]: opened.read(layer) for layer in opened.manifest("latest")["layers"]}
    artifact = read_artifact(opened, opened.tagged("latest"))
    payloads = {form: decompress(layers[name], 1 << 24) for form, name in PAYLOAD_TYPES.items()}
    region = payloads[ENCODED][len(artifact.payloads[ENCODED].erofs) :]
    tables = [region[: parse_frame_table(region)[1]]]
    return Image(layout, artifact, payloads, tables, decompress(layers[CONTENTS_TYPE], 1 << 20), layers[BLOB_TYPE])
