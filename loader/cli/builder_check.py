"""`erofs-builder check`."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import click

from loader.cli.bars import progress_bars
from loader.cli.builder_options import config_option, opened_artifact, platform_option
from loader.cli.common import human_size, insecure_option, json_option, print_json, verbose_here_option
from loader.convert.check import Damage, Report, check_artifact, check_failed
from loader.registry.base import Descriptor


@click.command()
@click.argument("reference")
@platform_option
@insecure_option
@config_option
@json_option
@verbose_here_option
def check(reference: str, platform: str | None, insecure: bool, config: str | None, as_json: bool) -> None:
    """Verify every byte of the artifact that REFERENCE names or that belongs to the image it names.

    Manifest, metadata of both forms, frame tables, every frame and its content. Names the files behind a bad frame.
    Ends with 12 if data is damaged, 15 if the artifact's documents are malformed.
    """
    with opened_artifact(reference, platform, config, insecure) as (source, descriptor, artifact):
        report = check_artifact(source, artifact, progress_bars(quiet=as_json), threads=min(os.cpu_count() or 1, 8))
    if as_json:
        print_json(_document(descriptor, report))
    else:
        _show(descriptor, report)
    if report.damage:
        raise check_failed(report)


def _show(descriptor: Descriptor, report: Report) -> None:
    for item in report.damage:
        place = f"frame {item.frame}" if item.frame is not None else "whole"
        click.echo(f"DAMAGED  blob {item.blob}, {place}: {item.message}")
        for path in item.paths:
            click.echo(f"         {path}")
        if item.files > len(item.paths):
            click.echo(f"         and {item.files - len(item.paths):,} files more")
    if not report.damage:
        fingerprints = f", {report.fingerprints:,} fingerprints" if report.fingerprints else ""
        click.echo(
            f"ok: {descriptor.digest}: {' and '.join(report.forms)} metadata, {report.inodes:,} inodes, "
            f"{report.frames:,} frames, {human_size(report.bytes)} in {report.blobs} blobs, {report.pieces:,} pieces"
            f"{fingerprints}"
        )


def _document(descriptor: Descriptor, report: Report) -> dict[str, Any]:
    document = asdict(report)
    document["damage"] = [_damage(item) for item in report.damage]
    return {"artifact": str(descriptor.digest), "ok": not report.damage, **document}


def _damage(item: Damage) -> dict[str, Any]:
    return {**asdict(item), "blob": str(item.blob)}
