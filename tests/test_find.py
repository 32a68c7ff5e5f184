"""From an image to its artifact: the usual tag saves a round trip, and decides nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.artifact import ARTIFACT_TYPE, MANIFEST_TYPE, METADATA_TYPES, Artifact
from loader.errors import NotFoundError, RegistryError
from loader.registry.base import Descriptor
from loader.registry.documents import describe_manifest
from loader.registry.find import find_artifact


def _artifact(subject: Descriptor, content: bytes) -> bytes:
    form = Form.ENCODED
    payload = Descriptor(METADATA_TYPES[form], Digest.of(content), len(content))
    return Artifact([], {form: payload}, subject=subject).encode()


class _Source:
    """Keeps manifests by digest once they were asked for, as a registry's client does."""

    def __init__(self, tags: dict[str, bytes], listed: list[bytes]) -> None:
        self.tags, self.listed = tags, listed
        self.kept: dict[Digest, bytes] = {}
        self.fetched: list[str] = []

    def resolve(self, reference: str) -> Descriptor:
        if reference == "broken-erofs":
            raise RegistryError("broken")
        if reference not in self.tags:
            raise NotFoundError(reference)
        found = describe_manifest(self.tags[reference], reference)
        self.kept[found.digest] = self.tags[reference]
        return found

    def manifest(self, descriptor: Descriptor) -> bytes:
        if descriptor.digest not in self.kept:
            self.fetched.append(str(descriptor.digest))
            self.kept |= {Digest.of(data): data for data in self.listed}
        return self.kept[descriptor.digest]

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        assert artifact_type == ARTIFACT_TYPE
        return [describe_manifest(data, "") for data in self.listed]


IMAGE = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": {}, "layers": []}).encode()
SUBJECT = describe_manifest(IMAGE, "")
OURS, OTHER = _artifact(SUBJECT, b"ours"), _artifact(SUBJECT, b"other")


@pytest.mark.parametrize(
    ("tag", "more", "fetches"),
    [
        ("1", {"1-erofs": OURS}, None),  # mostly none, and one more where the machine is slow
        ("1", {"1-erofs": OTHER}, 1),  # was replaced, or is not listed
        ("1", {"1-erofs": IMAGE}, 1),
        ("1", {}, 1),
        ("broken", {}, 1),
    ],
)
def test_what_is_listed_counts(tag: str, more: dict[str, bytes], fetches: int | None) -> None:
    source: Any = _Source({tag: IMAGE, **more}, [OURS])
    descriptor, artifact = find_artifact(source, tag)
    assert descriptor.digest == Digest.of(OURS)
    assert artifact.subject is not None and artifact.subject.digest == SUBJECT.digest
    assert fetches is None or len(source.fetched) == fetches


def test_an_image_without_a_listed_artifact_has_none() -> None:
    source: Any = _Source({"1": IMAGE, "1-erofs": OURS}, [])
    with pytest.raises(NotFoundError, match="no erofs-ondemand artifact"):
        find_artifact(source, "1")
