"""Open whatever a reference names as a source or target of images.

The modules of archives and registries are loaded where they are needed: the HTTP stack takes longer to load than
Python itself, and a conversion between layouts never uses it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from loader.errors import UsageError
from loader.registry.base import ImageSource, ImageTarget
from loader.registry.config import RegistryConfig
from loader.registry.known import KnownHosts
from loader.registry.layout import Layout
from loader.registry.reference import (
    DockerArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
    parse_reference,
)

if TYPE_CHECKING:
    from loader.registry.client import Registry
    from loader.registry.transport import Transport


def open_image(text: str, config: RegistryConfig) -> tuple[ImageSource, str]:
    """The source that a reference names, and what to `resolve` there. The caller closes the source."""
    return open_reference(parse_reference(text), config)


def open_reference(reference: Reference, config: RegistryConfig) -> tuple[ImageSource, str]:
    """`open_image` for a parsed reference; UsageError for a directory tree, which is no image yet."""
    if isinstance(reference, RegistryReference):
        return _registry(reference, config), reference.name
    if isinstance(reference, LayoutReference):
        if reference.scheme == "oci-archive":
            from loader.registry.archive import OciArchive

            return OciArchive(reference.path), reference.name
        return Layout(reference.path), reference.name
    if isinstance(reference, DockerArchiveReference):
        from loader.registry.archive import DockerArchive

        return DockerArchive(reference.path), reference.name
    raise UsageError(f"{reference}: a directory is not an image", "convert it first: erofs-builder convert")


class Opener:
    """Opens any number of repositories, whose connections and TLS settings are one set for each host. Thread-safe."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._known = KnownHosts()

    def open(self, text: str) -> ImageSource:
        """The source that a reference names. The caller closes it."""
        reference = parse_reference(text)
        if isinstance(reference, RegistryReference):
            return _registry(reference, self._config, self._shared(), self._known)
        return open_reference(reference, self._config)[0]

    def _shared(self) -> Transport:
        from loader.registry.transport import PooledTransport

        with self._lock:
            if self._transport is None:
                self._transport = PooledTransport(self._config)
            return self._transport

    def close(self) -> None:
        """Give back the connections of all that were opened."""
        with self._lock:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()


def open_target(text: str, config: RegistryConfig) -> tuple[ImageTarget, str | None]:
    """The target that a reference names, and the tag to write there (None: none). The caller closes it."""
    reference = check_target(text)
    if isinstance(reference, RegistryReference):
        return _registry(reference, config), reference.name
    return Layout(reference.path, create=True), reference.tag


def check_target(text: str) -> RegistryReference | LayoutReference:
    """A reference that can be written to; UsageError for any other."""
    reference = parse_reference(text)
    if isinstance(reference, RegistryReference) and reference.digest is None:
        return reference
    if isinstance(reference, LayoutReference) and reference.scheme == "oci" and reference.digest is None:
        return reference
    raise UsageError(f"{text}: cannot be written to", "a target is docker://HOST/REPOSITORY:TAG or oci:DIR[:TAG]")


def _registry(
    reference: RegistryReference,
    config: RegistryConfig,
    transport: Transport | None = None,
    known: KnownHosts | None = None,
) -> Registry:
    from loader.registry.client import Registry

    return Registry(reference.host, reference.repository, config, transport, known=known)
