"""The Debian image in a registry, with its artifact, and unpacked: what benches that read all of it begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.demo import run
from bench.node import BUILDER
from tests.images import catalog
from tests.images.layout import push
from tests.support.registry import docker_registry

IMAGE = "debian:12"


class Published(NamedTuple):
    """`registry` is its host:port, `storage` where it keeps blobs, `image` a reference, `tree` what umoci unpacked of
    `layout`."""

    registry: str
    storage: Path
    image: str
    tree: Path
    layout: Path


@contextmanager
def published(scratch: Path) -> Iterator[Published]:
    """All of it below `scratch`; the registry runs meanwhile."""
    layout, tree = catalog.image("debian") / "oci", scratch / "tree"
    with docker_registry(scratch / "registry") as registry:
        push(layout, f"{registry}/{IMAGE}")
        image = f"docker://{registry}/{IMAGE}"
        run(BUILDER, "convert", "--insecure", image, f"{image}-erofs")
        run("umoci", "unpack", "--image", f"{layout}:latest", tree)
        yield Published(registry, scratch / "registry/storage", image, tree / "rootfs", layout)
