"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fuzz import formats, layers, packets, planes, registry


class Target(NamedTuple):
    """A target: see the package's docstring. `longest` input in bytes, `share` of a long run's time."""

    run: Callable[[bytes], None]
    allowed: tuple[type[Exception], ...]
    longest: int
    share: int = 1

    def __call__(self, data: bytes) -> None:
        """Run it; only a find comes out."""
        try:
            self.run(data)
        except self.allowed:
            pass


TARGETS = {
    "artifact": Target(formats.artifact, formats.ALLOWED, 4096),
    "cachefiles": Target(packets.cachefiles, packets.ALLOWED, 1024),
    "compressed-payload": Target(formats.compressed_payload, formats.ALLOWED, 4096),
    "contents": Target(formats.contents, formats.ALLOWED, 4096),
    "control": Target(packets.control, packets.ALLOWED, 2048),
    "cookie": Target(planes.cookie, planes.ALLOWED, 512),
    "decompress": Target(layers.decompress, layers.ALLOWED, 8192),
    "docker-archive": Target(registry.docker_archive, registry.ALLOWED, 16384),
    "erofs": Target(formats.erofs, formats.ALLOWED, 512, 4),
    "fanotify": Target(packets.fanotify, packets.ALLOWED, 1024),
    "frame-table": Target(formats.frame_table, formats.ALLOWED, 4096),
    "headers": Target(registry.headers, registry.ALLOWED, 1024),
    "hints": Target(formats.hints, formats.ALLOWED, 1024),
    "imports": Target(layers.imports, layers.ALLOWED, 2048),
    "index": Target(registry.index, registry.ALLOWED, 4096),
    "keeper": Target(packets.keeper, packets.ALLOWED, 2048),
    "layer": Target(layers.layer, layers.ALLOWED, 8192, 2),
    "notify": Target(packets.notify, packets.ALLOWED, 512),
    "packet": Target(packets.packet, packets.ALLOWED, 1024),
    "payload": Target(formats.payload, formats.ALLOWED, 2048),
    "plane": Target(planes.plane, planes.ALLOWED, 1024),
    "plane-cachefiles": Target(planes.plane_of_cachefiles, planes.ALLOWED, 1024),
    "range-answer": Target(planes.range_answer, planes.ALLOWED, 2048),
    "reference": Target(registry.reference, registry.ALLOWED, 512),
    "registry": Target(registry.registry, registry.ALLOWED, 4096, 2),
    "tar": Target(layers.tar, layers.ALLOWED, 8192, 2),
    "tar-headers": Target(layers.tar_headers, layers.ALLOWED, 2048),
    "trace": Target(planes.trace, planes.ALLOWED, 2048),
}
