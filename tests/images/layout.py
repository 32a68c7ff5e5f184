"""Write and read OCI layouts by hand: for layers that other programs made as plain tar files."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
SUFFIXES = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}


class Layout:
    """An OCI layout directory under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob_path(self, digest: str) -> Path:
        """Where the blob `sha256:…` lies."""
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def add_bytes(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Store a blob; returns its descriptor."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_file(self, file: Path, media_type: str) -> dict[str, Any]:
        """Move a file in as a blob; returns its descriptor."""
        digest = "sha256:" + file_digest(file)
        size = file.stat().st_size
        shutil.move(file, self.blob_path(digest))
        return {"mediaType": media_type, "digest": digest, "size": size}

    def add_layer(self, tar: Path, compression: str) -> dict[str, Any]:
        """Store the plain tar file `tar` as a layer, compressed by `none`, `gzip` or `zstd`; returns its descriptor."""
        packed = self.path / "layer.tmp"
        if compression == "none":
            shutil.copyfile(tar, packed)
        elif compression == "gzip":
            with open(tar, "rb") as source, open(packed, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as out:
                shutil.copyfileobj(source, out, 1 << 20)
        else:
            subprocess.run(["zstd", "-q", "-3", "-f", tar, "-o", packed], check=True)
        return self.add_file(packed, LAYER_TYPE + SUFFIXES[compression])

    def write_image(
        self, tag: str, layers: Sequence[dict[str, Any]], diff_ids: Sequence[str], config: dict[str, Any]
    ) -> dict[str, Any]:
        """Write config and manifest and tag them; returns the manifest's descriptor."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.add_bytes(json.dumps(document).encode(), CONFIG_TYPE),
            "layers": list(layers),
        }
        descriptor = self.add_bytes(json.dumps(manifest).encode(), MANIFEST_TYPE)
        self.tag(tag, descriptor)
        return descriptor

    def tag(self, tag: str, descriptor: dict[str, Any]) -> None:
        """Point `tag` at a descriptor."""
        index = self.path / "index.json"
        manifests = json.loads(index.read_text())["manifests"] if index.exists() else []
        name = "org.opencontainers.image.ref.name"
        manifests = [entry for entry in manifests if entry.get("annotations", {}).get(name) != tag]
        manifests.append({**descriptor, "annotations": {name: tag}})
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))

    def manifest(self, tag: str) -> dict[str, Any]:
        """The manifest that `tag` names."""
        for entry in json.loads((self.path / "index.json").read_text())["manifests"]:
            if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag:
                return dict(json.loads(self.blob_path(entry["digest"]).read_text()))
        raise KeyError(tag)


def file_digest(file: Path) -> str:
    """The sha256 of a file in hex."""
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_layers(
    path: Path, tars: Sequence[Path], compression: Sequence[str], config: dict[str, Any], tag: str = "latest"
) -> None:
    """Write an image into an OCI layout from plain tar files, each with its own compression."""
    layout = Layout(path)
    layers, diff_ids = [], []
    for tar, method in zip(tars, compression, strict=True):
        diff_ids.append("sha256:" + file_digest(tar))
        layers.append(layout.add_layer(tar, method))
    layout.write_image(tag, layers, diff_ids, config)


def decompress_layers(source: Path, target: Path) -> None:
    """Copy the image `latest` of an OCI layout into a new one with uncompressed layers (gzip and zstd do it)."""
    old, new = Layout(source), Layout(target)
    manifest = old.manifest("latest")
    config = json.loads(old.blob_path(manifest["config"]["digest"]).read_text())
    layers = []
    for layer in manifest["layers"]:
        plain = target / "plain.tmp"
        suffix = layer["mediaType"].rpartition("+")[2]
        command = {"gzip": ["gzip", "-dc"], "zstd": ["zstd", "-dcq"]}.get(suffix, ["cat"])
        with open(old.blob_path(layer["digest"])) as packed, open(plain, "wb") as out:
            subprocess.run(command, stdin=packed, stdout=out, check=True)
        layers.append(new.add_file(plain, LAYER_TYPE))
    new.write_image("latest", layers, config["rootfs"]["diff_ids"], config["config"])


def push(layout: Path, target: str, tag: str = "latest") -> None:
    """Push an image of an OCI layout to a registry of plain HTTP with skopeo; `target` is "host:port/name:tag"."""
    command = ["skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*command, f"oci:{layout}:{tag}", f"docker://{target}"], check=True, stdin=subprocess.DEVNULL)
