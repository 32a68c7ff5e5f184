"""Manifests and indexes as JSON: parsing, platform selection, referrer lists. Pure code."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from typing import Any

from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from loader.artifact import INDEX_TYPE, MANIFEST_TYPE, descriptor_from_json, descriptor_to_json
from loader.errors import NotFoundError, UsageError
from loader.registry.base import Descriptor

DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
INDEX_TYPES = (INDEX_TYPE, DOCKER_LIST_TYPE)
MANIFEST_TYPES = (MANIFEST_TYPE, DOCKER_MANIFEST_TYPE)
ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
MANIFEST_LIMIT = 4 << 20  # bytes; registries commonly refuse larger ones
_PLATFORM = re.compile(r"[a-z0-9][a-z0-9._-]*(?:/[a-z0-9][a-z0-9._-]*){1,2}\Z")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "loongarch64": "loong64"}


def parse_document(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; ArtifactError if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{what}: not JSON") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{what}: not a JSON object")
    return document


def media_type_of(document: dict[str, Any], header: str = "") -> str:
    """A manifest's media type: its own word, else the registry's, else what its fields say."""
    own = document.get("mediaType")
    if isinstance(own, str) and own:
        return own
    named = header.partition(";")[0].strip()
    if named in MANIFEST_TYPES or named in INDEX_TYPES:
        return named
    return INDEX_TYPE if "manifests" in document else MANIFEST_TYPE


def describe_manifest(data: bytes, what: str, header: str = "") -> Descriptor:
    """The descriptor of a manifest or index at hand."""
    document = parse_document(data, what)
    artifact_type = document.get("artifactType")
    return Descriptor(
        media_type_of(document, header),
        Digest.of(data),
        len(data),
        artifact_type=artifact_type if isinstance(artifact_type, str) else None,
    )


def index_entries(data: bytes, what: str) -> list[Descriptor]:
    """The descriptors of an index."""
    manifests = parse_document(data, what).get("manifests")
    if not isinstance(manifests, list):
        raise ArtifactError(f"{what}: an index without manifests")
    return [descriptor_from_json(entry) for entry in manifests]


def subject_of(data: bytes) -> Descriptor | None:
    """The descriptor that a manifest names as its subject."""
    subject = parse_document(data, "manifest").get("subject")
    return descriptor_from_json(subject) if subject else None


def as_referrer(descriptor: Descriptor, data: bytes) -> Descriptor:
    """A manifest's descriptor as it stands in a list of referrers: with artifact type and annotations."""
    document = parse_document(data, "manifest")
    config = document.get("config")
    fallback = config.get("mediaType") if isinstance(config, dict) else None
    annotations = document.get("annotations")
    annotations = annotations if isinstance(annotations, dict) else {}
    return replace(
        descriptor,
        artifact_type=_text(document.get("artifactType")) or _text(fallback),
        annotations={key: value for key, value in annotations.items() if isinstance(value, str)},
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def encode_index(manifests: list[Descriptor], **more: Any) -> bytes:
    """An index's bytes; `more` are further top-level fields (artifactType, subject, annotations)."""
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, **more}
    document["manifests"] = [descriptor_to_json(entry) for entry in manifests]
    return json.dumps(document, indent=1).encode()


def add_referrer(index: bytes | None, referrer: Descriptor) -> bytes | None:
    """The fallback tag's index with `referrer` in it; None if it is there already."""
    entries = index_entries(index, "referrers tag") if index else []
    if any(entry.digest == referrer.digest for entry in entries):
        return None
    return encode_index([*entries, referrer])


def fallback_tag(subject: Digest) -> str:
    """The tag under which referrers are listed where the registry has no referrers API."""
    return f"sha256-{subject.hex}"


def host_platform() -> str:
    """This machine's platform as OCI writes it, e.g. linux/amd64."""
    machine = platform.machine()
    return f"linux/{_MACHINES.get(machine, machine)}"


def platform_text(descriptor: Descriptor) -> str:
    """A descriptor's platform as os/architecture[/variant], or empty."""
    return join_platform(descriptor.platform or {})


def join_platform(fields: dict[str, Any]) -> str:
    """os/architecture[/variant] of a descriptor's platform, or of an image's config; empty where nothing is said."""
    parts = [fields.get("os"), fields.get("architecture"), fields.get("variant")]
    return "/".join(str(part) for part in parts if part)


def check_platform(text: str) -> None:
    """UsageError for what is no os/architecture[/variant]."""
    if not _PLATFORM.match(text):
        raise UsageError(f"platform {text!r}: expected os/architecture[/variant], e.g. linux/amd64")


def suits(platform_: str, wanted: str) -> bool:
    """Whether a platform is the wanted one, or a variant of it where none is said. Of arm64 there is one only."""
    arm64 = "linux/arm64"
    return f"{platform_}/".startswith(f"{wanted}/") or (wanted.startswith(arm64) and platform_.startswith(arm64))


def select_platform(entries: list[Descriptor], wanted: str, what: str) -> Descriptor:
    """The entry of an index for os/architecture[/variant]; NotFoundError lists what there is instead."""
    check_platform(wanted)
    for entry in entries:
        if platform_text(entry) == wanted:
            return entry
    for entry in entries:
        if suits(platform_text(entry), wanted):
            return entry
    if len(entries) == 1 and not platform_text(entries[0]):
        return entries[0]
    there = ", ".join(sorted({platform_text(entry) for entry in entries} - {"", "unknown/unknown"}))
    raise NotFoundError(f"{what}: no image for {wanted}", f"there are: {there}" if there else None)
