"""What is converted: an image's layers and config, one image per platform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from erofs_builder.command import Command
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError, FormatError, UnsupportedError
from loader.artifact import ARTIFACT_TYPE, descriptor_from_json
from loader.errors import NotFoundError, UsageError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.documents import (
    INDEX_TYPES,
    host_platform,
    index_entries,
    join_platform,
    parse_document,
    platform_text,
    select_platform,
    suits,
)

ALL_PLATFORMS = "all"
_CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """A layer as its image has it, and the digest of its plain tar."""

    descriptor: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image of one platform. `subject` is its manifest, unless the source made that up (docker-archive)."""

    source: ImageSource
    descriptor: Descriptor
    layers: tuple[SourceLayer, ...]
    platform: dict[str, Any]
    subject: Descriptor | None
    command: Command = field(default_factory=Command)

    @property
    def platform_text(self) -> str:
        return join_platform(self.platform)


@dataclass(frozen=True, slots=True)
class SourceIndex:
    """The images to convert; `index` is the multi-platform index they come from, if all of it is converted.

    `named` is what the reference names: an image, or an index of which one image may be enough.
    """

    images: tuple[SourceImage, ...]
    named: Descriptor
    index: Descriptor | None = None


def load_source(source: ImageSource, reference: str, platform: str | None) -> SourceIndex:
    """The image that `reference` names; of an index the one for `platform` (default: this machine's), or all."""
    descriptor = source.resolve(reference)
    if descriptor.media_type not in INDEX_TYPES:
        image = _load_image(source, descriptor)
        if platform and platform != ALL_PLATFORMS and image.platform_text and not suits(image.platform_text, platform):
            raise NotFoundError(f"{source}: the image is for {image.platform_text}, not for {platform}")
        return SourceIndex((image,), descriptor)
    what = f"{source}@{descriptor.digest}"
    data = source.manifest(descriptor)
    _refuse_artifact(parse_document(data, what), what)
    entries = [entry for entry in index_entries(data, what) if _is_image(entry)]
    if platform == ALL_PLATFORMS:
        if not entries:
            raise NotFoundError(f"{what}: an index without images")
        return SourceIndex(tuple(_load_image(source, entry) for entry in entries), descriptor, descriptor)
    image = _load_image(source, select_platform(entries, platform or host_platform(), what))
    return SourceIndex((image,), descriptor)


def _is_image(entry: Descriptor) -> bool:
    """Not an attestation or another attachment that build tools put into an index."""
    attached = "vnd.docker.reference.type" in entry.annotations
    return not attached and not platform_text(entry).startswith("unknown") and entry.artifact_type is None


def _load_image(source: ImageSource, descriptor: Descriptor) -> SourceImage:
    what = f"{source}@{descriptor.digest}"
    document = parse_document(source.manifest(descriptor), what)
    _refuse_artifact(document, what)
    try:
        config_descriptor = descriptor_from_json(document["config"])
        layers = [descriptor_from_json(layer) for layer in document["layers"]]
    except (KeyError, TypeError):
        raise ArtifactError(f"{what}: not an image manifest (schema 2)") from None
    if config_descriptor.media_type not in _CONFIG_TYPES or len(layers) > _MAX_LAYERS:
        raise UnsupportedError(f"{what}: not a container image (its config is {config_descriptor.media_type!r})")
    config = parse_document(source.blob(config_descriptor), f"{what}: config")
    subject = None if _made_up(source) else _bare(descriptor)
    with_diff_ids = _with_diff_ids(layers, config, what)
    return SourceImage(source, descriptor, with_diff_ids, _platform(config), subject, command_of(config))


def _made_up(source: ImageSource) -> bool:
    """Whether the source's manifests are its own invention, which nobody else could refer to."""
    from loader.registry.archive import DockerArchive  # late, as in registry/open.py

    return isinstance(source, DockerArchive)


def _bare(descriptor: Descriptor) -> Descriptor:
    """Without what only the place it was found in says (tag, platform)."""
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)


def _with_diff_ids(layers: list[Descriptor], config: dict[str, Any], what: str) -> tuple[SourceLayer, ...]:
    try:
        diff_ids = [Digest.parse(text) for text in (config["rootfs"] or {}).get("diff_ids") or []]
    except (KeyError, TypeError, AttributeError, FormatError):
        raise ArtifactError(f"{what}: its config has no usable rootfs.diff_ids") from None
    if len(diff_ids) != len(layers):
        raise ArtifactError(f"{what}: {len(layers)} layers, but {len(diff_ids)} diff_ids in its config")
    for layer in layers:
        if "encrypted" in layer.media_type:
            raise UnsupportedError(f"{what}: layer {layer.digest} is encrypted")
    return tuple(SourceLayer(layer, diff_id) for layer, diff_id in zip(layers, diff_ids, strict=True))


def _platform(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("architecture", "os", "variant")
    return {key: config[key] for key in keys if isinstance(config.get(key), str) and config[key]}


def _refuse_artifact(document: dict[str, Any], what: str) -> None:
    if document.get("artifactType") == ARTIFACT_TYPE:
        raise UsageError(f"{what}: is converted already", "name the source image, not its artifact")


def command_of(config: Mapping[str, Any]) -> Command:
    """The command of an image's config; without one, or with a malformed one, an empty command."""
    section = config.get("config")
    section = section if isinstance(section, dict) else {}
    directory = section.get("WorkingDir")
    return Command(
        (*_strings(section.get("Entrypoint")), *_strings(section.get("Cmd"))),
        _strings(section.get("Env")),
        directory if isinstance(directory, str) and directory.startswith("/") else "/",
    )


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
