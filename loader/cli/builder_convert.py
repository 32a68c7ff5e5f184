"""`erofs-builder convert`."""

from __future__ import annotations

import os
from typing import Any

import click

from erofs_builder.blob import DEFAULT_LEVEL, HARD_LEVEL
from erofs_builder.fingerprint import LARGE
from erofs_builder.layer import Options
from erofs_builder.payload import PAYLOAD_LEVEL
from loader.artifact import descriptor_to_json
from loader.cli.bars import progress_bars
from loader.cli.builder_options import checked_platforms, config_option, registry_config, warn_of_platform
from loader.cli.common import human_size, insecure_option, json_option, print_json, print_table, verbose_here_option
from loader.convert.convert import Converted, ConvertedLayer, Request, Result, lean_memory
from loader.convert.convert import convert as convert_image
from loader.convert.source import ALL_PLATFORMS

_UPDATE = 64 << 20  # bytes of each layer: an update is small, and fetched by many


_FINGERPRINTS = {"none": None, "large": LARGE, "all": 1}


@click.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    callback=checked_platforms,
    help="Of a multi-platform image; `all` for every one. Default: this machine's.",
)
@click.option(
    "--base", metavar="REF", help="Leave out what this artifact's (or image's artifact's) blobs hold already."
)
@click.option(
    "--level",
    type=click.IntRange(1, 19),
    help=f"zstd level of the data. Default: {DEFAULT_LEVEL}, with --base {HARD_LEVEL} for 64 MiB that the base lacks.",
)
@click.option(
    "--metadata-level",
    type=click.IntRange(1, 22),
    default=PAYLOAD_LEVEL,
    show_default=True,
    help="zstd level of the metadata; 19 for images that many nodes will mount.",
)
@click.option(
    "--threads", type=click.IntRange(1, 64), default=min(os.cpu_count() or 1, 16), help="Compressing threads."
)
@click.option(
    "--fingerprints",
    type=click.Choice(list(_FINGERPRINTS)),
    default="large",
    show_default=True,
    help="Carry fingerprints of files from 64 KiB on, or of all (25 bytes each), by which kernels share page cache.",
)
@click.option(
    "--trace",
    metavar="TRACE",
    help="Rebuild the layout for a start that was traced: a file of `erofs-loader trace --output`, or an image whose "
    "newest published trace of pages is taken. One blob more has all that the start touches.",
)
@insecure_option
@config_option
@json_option
@verbose_here_option
def convert(
    source: str,
    target: str,
    platform: str | None,
    base: str | None,
    level: int | None,
    metadata_level: int,
    threads: int,
    fingerprints: str,
    trace: str | None,
    insecure: bool,
    config: str | None,
    as_json: bool,
) -> None:
    """Convert SOURCE and publish the artifact as TARGET.

    SOURCE is docker://, oci:, oci-archive:, docker-archive: or rootfs:; TARGET is docker://HOST/REPOSITORY:TAG or
    oci:DIR[:TAG], whose tag names an earlier artifact or nothing yet. The artifact refers to the source image, which
    stays as it is: where both are in one repository, either name mounts.
    """
    lean_memory()
    hard = _UPDATE if base and level is None else 0
    options = Options(
        level=level or DEFAULT_LEVEL, hard=hard, threads=threads, fingerprints=_FINGERPRINTS[fingerprints]
    )
    request = Request(source, target, platform, base, options, metadata_level, trace)
    result = convert_image(request, registry_config(config, insecure), progress_bars(quiet=as_json))
    if platform and platform != ALL_PLATFORMS and not result.images[0].platform:
        warn_of_platform(source, platform)
    if as_json:
        print_json(_document(result))
        return
    for image in result.images:
        _show(image)
    tag = f":{result.tag}" if result.tag and not result.target.endswith(f":{result.tag}") else ""
    digest = (result.index or result.images[0].published.descriptor).digest
    click.echo(f"{result.target}{tag}@{digest} in {result.seconds:.1f} s")


def _show(image: Converted) -> None:
    if image.platform:
        click.echo(f"platform {image.platform}")
    rows = [_row(image, item) for item in image.layers]
    print_table(("layer", "size", "blob", "size", "seconds", ""), rows, right=(1, 3, 4))
    artifact, inodes = image.assembled.artifact, image.assembled.inodes
    forms = ", ".join(
        f"{form.value} {human_size(item.size)} ({item.size / max(inodes, 1):.1f} bytes an inode)"
        for form, item in artifact.metadata.items()
    )
    total = sum(blob.size for blob in artifact.blobs)
    click.echo(f"metadata: {forms}")
    click.echo(
        f"{inodes:,} inodes, {human_size(image.assembled.file_bytes)} of files, "
        f"{human_size(total)} in {len(artifact.blobs)} blobs"
    )


def _row(image: Converted, item: ConvertedLayer) -> tuple[object, ...]:
    blob = item.layer.blob
    name = item.source.digest.hex[:12] if item.source else "directory"
    size = human_size(item.source.size) if item.source else ""
    if blob is None or blob.table is None:
        return name, size, "-", "", f"{item.seconds:.1f}", "holds no new file data"
    how = image.published.uploaded.get(blob.digest, "not needed: other blobs hold all of it")
    return name, size, blob.digest.hex[:12], human_size(blob.table.blob_size), f"{item.seconds:.1f}", how


def _document(result: Result) -> dict[str, Any]:
    return {
        "target": result.target,
        "tag": result.tag,
        "digest": str((result.index or result.images[0].published.descriptor).digest),
        "seconds": round(result.seconds, 3),
        "images": [_image_document(image) for image in result.images],
    }


def _image_document(image: Converted) -> dict[str, Any]:
    artifact = image.assembled.artifact
    return {
        "platform": image.platform or None,
        "artifact": descriptor_to_json(image.published.descriptor),
        "subject": descriptor_to_json(image.subject) if image.subject else None,
        "inodes": image.assembled.inodes,
        "file_bytes": image.assembled.file_bytes,
        "layers": [_layer_document(image, item) for item in image.layers],
        "blobs": [
            {**descriptor_to_json(blob), "stored": image.published.uploaded.get(blob.digest)} for blob in artifact.blobs
        ],
        "metadata": {form.value: descriptor_to_json(item) for form, item in artifact.metadata.items()},
    }


def _layer_document(image: Converted, item: ConvertedLayer) -> dict[str, Any]:
    blob = item.layer.blob
    return {
        "source": descriptor_to_json(item.source) if item.source else None,
        "blob": str(blob.digest) if blob else None,
        "blob_size": blob.table.blob_size if blob and blob.table else 0,
        "seconds": round(item.seconds, 3),
    }
