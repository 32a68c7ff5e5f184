"""The tag that an artifact is to be published under: a name of an artifact, or of nothing yet."""

from __future__ import annotations

from collections.abc import Collection

from erofs_builder.digest import Digest
from loader.artifact import ARTIFACT_TYPE
from loader.errors import UsageError
from loader.registry.base import ImageTarget
from loader.registry.documents import parse_document
from loader.registry.find import USUAL_SUFFIX


def check_tag(target: ImageTarget, name: str, tag: str, source: Collection[Digest]) -> None:
    """UsageError if the tag names an image, which would lose it: who pulls that tag could run nothing any more.

    `name` is the target with its tag, `source` the digests of the image that is converted.
    """
    found = target.tagged(tag)
    if found is None:
        return
    descriptor, data = found
    if parse_document(data, name).get("artifactType") == ARTIFACT_TYPE:
        return
    which = "the source image" if descriptor.digest in source else "another image"
    raise UsageError(
        f"{name} is {which}; its tag would name the artifact instead",
        f"take another tag, by custom {name}{USUAL_SUFFIX}",
    )
