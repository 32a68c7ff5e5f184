"""Small container images written by hand, for what no tool would write; `tar_of` uses Python's tarfile."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import zstandard

from erofs_builder.digest import Digest
from loader.registry.base import Descriptor
from loader.registry.layout import Layout

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar of regular files (a name that ends in a slash: a directory)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.mtime = 1_700_000_000
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def add_image(
    layout: Layout,
    layers: list[bytes],
    tag: str | None,
    packing: str = "gzip",
    platform: str = "linux/amd64",
    diff_ids: list[str] | None = None,
) -> Descriptor:
    """Put an image of these plain tars into a layout; packing is gzip, zstd or plain."""
    descriptors = [put(layout, *_packed(layer, packing)) for layer in layers]
    os_, architecture = platform.split("/")
    config = {
        "os": os_,
        "architecture": architecture,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [str(Digest.of(layer)) for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": describe(put(layout, CONFIG, json.dumps(config).encode())),
        "layers": [describe(descriptor) for descriptor in descriptors],
    }
    return layout.put_manifest(MANIFEST, json.dumps(manifest).encode(), tag)


def add_index(layout: Layout, entries: list[tuple[Descriptor, str]], tag: str) -> Descriptor:
    """Put an index of (manifest, os/architecture) into a layout."""
    manifests = []
    for descriptor, platform in entries:
        os_, architecture = platform.split("/")
        manifests.append({**describe(descriptor), "platform": {"os": os_, "architecture": architecture}})
    document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    return layout.put_manifest(INDEX, json.dumps(document).encode(), tag)


def put(layout: Layout, media_type: str, data: bytes) -> Descriptor:
    """Store a blob."""
    descriptor = Descriptor(media_type, Digest.of(data), len(data))
    if not layout.has_blob(descriptor.digest):
        layout.put_blob(descriptor, iter((data,)))
    return descriptor


def describe(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": str(descriptor.digest), "size": descriptor.size}


def new_layout(path: Path) -> Layout:
    return Layout(path, create=True)


def _packed(layer: bytes, packing: str) -> tuple[str, bytes]:
    if packing == "gzip":
        return f"{LAYER}+gzip", gzip.compress(layer, 1, mtime=0)
    if packing == "zstd":
        return f"{LAYER}+zstd", zstandard.compress(layer, 1)
    return LAYER, layer
