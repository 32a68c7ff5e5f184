"""Small images with known contents, as an OCI layout: what every file must be is written down before any tool sees it.

`first` and `second` share their lowest layer; each has one more of its own, with whiteouts.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"

Files = dict[str, bytes]


def shared_files() -> Files:
    """About 4 MB that compress to half: many small files, some large, one of zeros."""
    numbers = random.Random(7)
    files: Files = {f"etc/conf.d/{n:03}.conf": _text(numbers, numbers.randrange(1, 9000)) for n in range(80)}
    files |= {f"usr/lib/lib{n}.so": numbers.randbytes(200_000) + _text(numbers, 300_000) for n in range(4)}
    files["usr/bin/large"] = _text(numbers, 700_000) + numbers.randbytes(400_001)
    files["var/zeros"] = bytes(300_000)
    files["etc/empty"] = b""
    files["etc/replaced"] = b"old"
    files["gone/deep/file"] = b"a whiteout takes it away"
    return files


def own_files(name: str) -> Files:
    """What only that image has; about 1 MB."""
    numbers = random.Random(zlib.crc32(name.encode()))
    return {
        f"opt/{name}/data": numbers.randbytes(600_000),
        f"opt/{name}/text": _text(numbers, 300_000),
        "etc/replaced": name.encode(),
    }


def _text(numbers: random.Random, size: int) -> bytes:
    words = [b"%x" % numbers.getrandbits(20) for _ in range(500)]
    return b" ".join(numbers.choices(words, k=size // 4 + 1))[:size]


def expected(name: str) -> dict[str, str]:
    """Path → sha256 of every regular file of the image."""
    files = {path: data for path, data in shared_files().items() if not path.startswith("gone/")}
    files |= own_files(name)
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def write_layout(folder: Path, names: tuple[str, ...] = ("first", "second")) -> Path:
    """An OCI layout at `folder` with one tag an image."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    base = _layer(shared_files(), ())
    manifests = [_image(blobs, name, [base, _layer(own_files(name), ("gone",))]) for name in names]
    index = {"schemaVersion": 2, "manifests": manifests}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _image(blobs: Path, name: str, tars: list[bytes]) -> dict[str, Any]:
    layers = [_store(blobs, LAYER_TYPE, gzip.compress(tar, 6, mtime=0)) for tar in tars]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/usr/bin/large"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _store(blobs, CONFIG_TYPE, json.dumps(config).encode()),
        "layers": layers,
    }
    descriptor = _store(blobs, MANIFEST_TYPE, json.dumps(manifest).encode())
    return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}}


def _store(blobs: Path, media_type: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _layer(files: Files, removed: tuple[str, ...]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in _folders(files):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
            tar.addfile(entry)
        for path, data in files.items():
            _add(tar, path, data)
        for name in removed:
            _add(tar, f".wh.{name}", b"")
    return stream.getvalue()


def _folders(files: Files) -> list[str]:
    return sorted({str(parent) for path in files for parent in Path(path).parents if str(parent) != "."})


def _add(tar: tarfile.TarFile, path: str, data: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode, entry.mtime = len(data), 0o644, 1_700_000_000
    tar.addfile(entry, io.BytesIO(data))
