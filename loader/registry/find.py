"""From a reference to the artifact: itself, or through the referrers of the source image."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

from erofs_builder.errors import ArtifactError, FormatError, IntegrityError
from loader.artifact import ARTIFACT_TYPE, GENERATION_ANNOTATION, Artifact
from loader.errors import LoaderError, NotFoundError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.documents import (
    INDEX_TYPES,
    host_platform,
    index_entries,
    parse_document,
    select_platform,
    subject_of,
)

USUAL_SUFFIX = "-erofs"  # of an artifact's tag, behind that of its source


def find_artifact(source: ImageSource, reference: str, platform: str | None = None) -> tuple[Descriptor, Artifact]:
    """The artifact that `reference` names, or that refers to the image that it names.

    Of an index (of images or of artifacts) the entry for `platform` is taken (default: this machine's).
    NotFoundError if the image was never converted.
    """
    wanted = platform or host_platform()
    descriptor = source.resolve(reference)
    artifact = _as_artifact(source, descriptor, wanted)
    if artifact is not None:
        return artifact
    usual = None if reference.startswith("sha256:") else _Usual(source, reference)
    artifact = _from_referrers(source, descriptor, wanted, usual)
    if artifact is None and descriptor.media_type in INDEX_TYPES:
        entries = index_entries(source.manifest(descriptor), f"{source}@{descriptor.digest}")
        descriptor = select_platform(entries, wanted, f"{source}")
        artifact = _from_referrers(source, descriptor, wanted)
    if artifact is not None:
        return artifact
    raise NotFoundError(
        f"{source}@{descriptor.digest}: this image has no erofs-ondemand artifact",
        "convert it first: erofs-builder convert SOURCE TARGET",
    )


class _Usual:
    """Has the source ask for the manifest of an image's usual artifact while it lists the referrers.

    What the list names is what counts. The source keeps manifests by digest: if it is this one, it is here already, one
    round trip sooner.
    """

    def __init__(self, source: ImageSource, tag: str) -> None:
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._ask, args=(source, tag + USUAL_SUFFIX), daemon=True)
        self._thread.start()

    def _ask(self, source: ImageSource, tag: str) -> None:
        with contextlib.suppress(LoaderError, FormatError, IntegrityError, OSError):
            source.resolve(tag)

    def wait(self) -> None:
        """Less long than it would take to ask again: as long as the list took, at most."""
        self._thread.join(time.monotonic() - self._begun)


def _from_referrers(
    source: ImageSource, subject: Descriptor, platform: str, usual: _Usual | None = None
) -> tuple[Descriptor, Artifact] | None:
    """The newest artifact that refers to an image or index. A list may name what is gone, or what refers elsewhere."""
    referrers = newest_first(source.referrers(subject.digest, ARTIFACT_TYPE))
    if referrers and usual is not None:
        usual.wait()
    for referrer in referrers:
        try:
            named = subject_of(source.manifest(referrer))
            if named is None or named.digest != subject.digest:
                continue
            artifact = _as_artifact(source, referrer, platform)
        except NotFoundError:
            continue
        if artifact is not None:
            return artifact
    return None


def generation_of(referrer: Descriptor) -> int:
    """Which one of a subject's artifacts this is, from 0; a number that is none counts as 0."""
    text = referrer.annotations.get(GENERATION_ANNOTATION, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def newest_first(referrers: Iterable[Descriptor]) -> list[Descriptor]:
    """Artifacts of one subject. A date would make each conversion's manifest another one, so generations are counted;
    of one generation, the last listed is taken for the newest."""
    numbered = [(generation_of(referrer), number, referrer) for number, referrer in enumerate(referrers)]
    return [referrer for _, _, referrer in sorted(numbered, key=lambda item: item[:2], reverse=True)]


def _as_artifact(source: ImageSource, descriptor: Descriptor, platform: str) -> tuple[Descriptor, Artifact] | None:
    """The artifact behind a descriptor: a manifest of ours, or an index of such; None if it is something else."""
    data = source.manifest(descriptor)
    document = parse_document(data, f"{source}@{descriptor.digest}")
    if document.get("artifactType") != ARTIFACT_TYPE:
        return None
    if descriptor.media_type not in INDEX_TYPES:
        return descriptor, Artifact.decode(data)
    entry = select_platform(index_entries(data, f"{source}@{descriptor.digest}"), platform, f"{source}")
    data = source.manifest(entry)
    if parse_document(data, f"{source}@{entry.digest}").get("artifactType") != ARTIFACT_TYPE:
        raise ArtifactError(f"{source}@{descriptor.digest}: an index of artifacts that holds something else")
    return entry, Artifact.decode(data)
