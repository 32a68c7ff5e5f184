"""mount.erofs of erofs-utils 1.9, with registries (scripts/build-erofs-utils.sh --oci): an image of mkfs.erofs is the
only layer of an OCI image, and is fetched range by range as fanotify says that it is read.

EROFS_OCI_BIN    directory of mount.erofs, where someone has one

It has the kernel read metadata from the same file, of which Linux before 7.1 tells nobody: its mounts end with EINVAL
there.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

from bench.peers import find, mkfs_erofs, push_blob

TITLE = "mount.erofs"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
REPOSITORY = "erofs"


def program() -> Path:
    """mount.erofs, built with registries."""
    return find("mount.erofs", "EROFS_OCI_BIN", "peers/erofs-utils-*/sbin")


def publish(tree: Path, registry: str, scratch: Path) -> str:
    """`tree` as mkfs.erofs builds it (zstd, 64 KiB), in a registry of plain HTTP; the digest of its blob.

    MissingPeer if one of the two programs is not here.
    """
    program()
    image = scratch / "mkfs.erofs"
    subprocess.run([mkfs_erofs(), "--quiet", "-zzstd,level=3", "-C65536", image, tree], check=True)
    config = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{}}'
    size = image.stat().st_size
    blob = push_blob(registry, REPOSITORY, image.read_bytes())
    image.unlink()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": push_blob(registry, REPOSITORY, config),
            "size": len(config),
        },
        "layers": [{"mediaType": "application/vnd.erofs.layer.v1", "digest": blob, "size": size}],
    }
    request = urllib.request.Request(
        f"http://{registry}/v2/{REPOSITORY}/manifests/1", data=json.dumps(manifest).encode(), method="PUT"
    )
    request.add_header("Content-Type", MANIFEST)
    urllib.request.urlopen(request).close()
    return blob


def command(registry: str, blob: str) -> list[str]:
    """What mounts it, without the mount point."""
    options = f"oci.insecure,oci.blob={blob}"
    return [str(program()), "-t", "erofs.fanotify", "-o", options, f"{registry}/{REPOSITORY}:1"]
