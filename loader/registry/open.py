"""Open whatever a reference names as a source or target of images.

The modules of archives and registries are loaded where they are needed: the HTTP stack takes longer to load than
Python itself, and a conversion between layouts never uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loader.errors import UsageError
from loader.registry.base import ImageSource, ImageTarget
from loader.registry.config import RegistryConfig
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


def _registry(reference: RegistryReference, config: RegistryConfig) -> Registry:
    from loader.registry.client import Registry

    return Registry(reference.host, reference.repository, config)
