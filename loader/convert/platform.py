"""Which platform an artifact is for."""

from __future__ import annotations

from contextlib import suppress

from erofs_builder.errors import ArtifactError
from loader.artifact import Artifact, descriptor_from_json
from loader.errors import NotFoundError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.documents import INDEX_TYPES, join_platform, parse_document, platform_text


def platform_of(source: ImageSource, descriptor: Descriptor, artifact: Artifact) -> str:
    """os/architecture[/variant] as the artifact's index has it, else its image's config; empty if nobody knows.

    The image may be in another repository, and a directory that was converted has none.
    """
    if text := platform_text(descriptor):
        return text
    if artifact.subject is None or artifact.subject.media_type in INDEX_TYPES:
        return ""
    with suppress(NotFoundError, ArtifactError, KeyError):
        what = f"{source}@{artifact.subject.digest}"
        config = descriptor_from_json(parse_document(source.manifest(artifact.subject), what)["config"])
        return join_platform(parse_document(source.blob(config), f"{what}: config"))
    return ""
