"""The images by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.images import adversarial, cache, debian, layout, small

SCRIPTS = {
    "debian": (debian.__file__,),
    "debian-old": (debian.__file__,),
    "debian-plain": (debian.__file__, layout.__file__),
    "small": (small.__file__, layout.__file__),
    "adversarial": (adversarial.__file__, layout.__file__),
    "layers127": (adversarial.__file__, layout.__file__),
}
IMAGES: dict[str, Callable[[Path], None]] = {
    "debian": debian.build_debian,
    "debian-old": lambda directory: debian.build_debian(directory, updates=False),
    "debian-plain": lambda directory: debian.build_debian_plain(directory, image("debian")),
    "small": small.build_small,
    "adversarial": adversarial.build_adversarial,
    "layers127": adversarial.build_layers127,
}


def image(name: str) -> Path:
    """The directory of image `name`, whose OCI layout is `oci` with the tag `latest`; made if it is not there."""
    return cache.cached(name, cache.script_key(*SCRIPTS[name]), IMAGES[name])
