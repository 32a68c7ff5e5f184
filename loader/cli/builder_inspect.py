"""`erofs-builder inspect`."""

from __future__ import annotations

from typing import Any

import click

from erofs_builder.errors import ArtifactError
from erofs_builder.frame_list import decode_frames
from loader.artifact import PAYLOAD_SIZE_ANNOTATION, START_ANNOTATION, Artifact, descriptor_to_json
from loader.cli.builder_options import config_option, opened_artifact, platform_option
from loader.cli.common import (
    human_size,
    insecure_option,
    json_option,
    percent,
    print_json,
    print_table,
    verbose_here_option,
)
from loader.convert.survey import Survey, load_tree, show_path, survey
from loader.registry.base import Descriptor


@click.command()
@click.argument("reference")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="How many of the largest files.")
@platform_option
@insecure_option
@config_option
@json_option
@verbose_here_option
def inspect(reference: str, top: int, platform: str | None, insecure: bool, config: str | None, as_json: bool) -> None:
    """Show the artifact that REFERENCE names or that belongs to the image it names: sizes, blobs, largest files."""
    with opened_artifact(reference, platform, config, insecure) as (source, descriptor, artifact):
        found = survey(load_tree(source, artifact), top)
    if as_json:
        print_json(_document(descriptor, artifact, found))
    else:
        _show(descriptor, artifact, found)


def _show(descriptor: Descriptor, artifact: Artifact, found: Survey) -> None:
    blob_bytes = sum(blob.size for blob in artifact.blobs)
    click.echo(f"artifact  {descriptor.digest}")
    click.echo(f"subject   {artifact.subject.digest if artifact.subject else '-'}")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common())
    click.echo(f"inodes    {found.inodes:,} under {found.names:,} names: {kinds}; {found.xattrs:,} xattrs")
    if found.fingerprints:
        click.echo(f"          {found.fingerprints:,} fingerprints: kernels of 7.0 and later can share page cache")
    for form, item in artifact.metadata.items():
        plain = int(item.annotations.get(PAYLOAD_SIZE_ANNOTATION, "0"))
        each = item.size / max(found.inodes, 1)
        click.echo(
            f"metadata  {form.value} {human_size(item.size)} ({each:.1f} bytes an inode), {human_size(plain)} mounted"
        )
    stored, shared = sum(use.bytes for use in found.blobs), sum(use.shared for use in found.blobs)
    click.echo(
        f"data      {human_size(found.file_bytes)} of files: {human_size(stored)} stored once, "
        f"{human_size(shared)} shared, {human_size(found.hole_bytes)} holes"
    )
    click.echo(f"          {human_size(blob_bytes)} compressed ({percent(blob_bytes, found.file_bytes)})")
    if start := _start(artifact, found):
        click.echo(f"start     {start['frames']:,} frames, {human_size(start['bytes'])} in {start['ranges']:,} ranges")
    click.echo()
    rows = [
        (
            blob.digest.hex[:12],
            human_size(blob.size),
            human_size(use.table.decoded_size),
            f"{len(use.table):,}",
            f"{use.files:,}",
            percent(use.bytes, use.table.decoded_size),
        )
        for blob, use in zip(artifact.blobs, found.blobs, strict=True)
    ]
    print_table(("blob", "size", "decoded", "frames", "files", "used"), rows, right=(1, 2, 3, 4, 5))
    if found.largest:
        click.echo()
        print_table(
            ("size", "largest files"), [(human_size(size), show_path(path)) for size, path in found.largest], (0,)
        )


def _start(artifact: Artifact, found: Survey) -> dict[str, int]:
    """How much the list of the start has, and in how many contiguous ranges; empty without a usable one."""
    try:
        places = sorted(set(decode_frames(artifact.annotations.get(START_ANNOTATION, ""))))
        size = sum(found.blobs[blob].table[frame].encoded_size for blob, frame in places)
    except (ArtifactError, IndexError):
        return {}
    ranges = sum(
        (blob, frame - 1) != before for (blob, frame), before in zip(places, [(-1, -1), *places], strict=False)
    )
    return {"frames": len(places), "bytes": size, "ranges": ranges} if places else {}


def _document(descriptor: Descriptor, artifact: Artifact, found: Survey) -> dict[str, Any]:
    return {
        "artifact": descriptor_to_json(descriptor),
        "subject": descriptor_to_json(artifact.subject) if artifact.subject else None,
        "annotations": artifact.annotations,
        "inodes": found.inodes,
        "names": found.names,
        "kinds": dict(found.kinds),
        "xattrs": found.xattrs,
        "fingerprints": found.fingerprints,
        "file_bytes": found.file_bytes,
        "hole_bytes": found.hole_bytes,
        "start": _start(artifact, found),
        "stored_bytes": sum(use.bytes for use in found.blobs),
        "shared_bytes": sum(use.shared for use in found.blobs),
        "blob_bytes": sum(blob.size for blob in artifact.blobs),
        "metadata": {form.value: descriptor_to_json(item) for form, item in artifact.metadata.items()},
        "contents": descriptor_to_json(artifact.contents) if artifact.contents else None,
        "blobs": [
            {
                "digest": str(blob.digest),
                "size": blob.size,
                "decoded_size": use.table.decoded_size,
                "frames": len(use.table),
                "files": use.files,
                "used_bytes": use.bytes,
                "shared_bytes": use.shared,
            }
            for blob, use in zip(artifact.blobs, found.blobs, strict=True)
        ],
        "largest": [{"path": show_path(path), "size": size} for size, path in found.largest],
    }
