"""`erofs-builder export`."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import click

from erofs_builder.erofs.flat import write_flat
from erofs_builder.model import Blob
from erofs_builder.payload import Form
from erofs_builder.tree import walk
from loader.artifact import BLOB_TYPE, Artifact
from loader.cli.bars import progress_bars
from loader.cli.builder_options import config_option, form_option, opened_artifact, platform_option
from loader.cli.common import human_size, insecure_option, json_option, print_json, verbose_here_option
from loader.convert.progress import Progress
from loader.convert.survey import load_tree
from loader.registry.base import Descriptor, ImageSource


@click.command()
@click.argument("reference")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@form_option
@platform_option
@insecure_option
@config_option
@json_option
@verbose_here_option
def export(
    reference: str, file: Path, form: str, platform: str | None, insecure: bool, config: str | None, as_json: bool
) -> None:
    """Write the artifact's tree as one flat EROFS image to FILE, which any kernel mounts alone (`-o loop`)."""
    with opened_artifact(reference, platform, config, insecure) as (source, descriptor, artifact):
        size = export_flat(source, artifact, Form(form), file, progress_bars(quiet=as_json))
    if as_json:
        print_json({"artifact": str(descriptor.digest), "form": form, "file": str(file), "size": size})
    else:
        click.echo(f"{file}: {human_size(size)}, {form} form of {descriptor.digest}")


def export_flat(source: ImageSource, artifact: Artifact, form: Form, file: Path, progress: Progress) -> int:
    """Write the flat image beside FILE and put it in its place when it is whole; its size."""
    some = form if form in artifact.metadata else None
    tree = load_tree(source, artifact, some)
    for _, node in walk(tree.root):
        node.fingerprint = b""  # of use to a node only, and fsck.erofs stops at an attribute without a name

    def open_blob(blob: Blob) -> BinaryIO:
        assert blob.table is not None
        return source.open_blob(Descriptor(BLOB_TYPE, blob.digest, blob.table.blob_size))

    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))
    handle, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out, progress.task(f"export {file.name}", None) as task:
            size = write_flat(tree.root, form, tree.blobs, open_blob, cast(BinaryIO, _Advancing(out, task.advance)))
            out.flush()
            os.fchmod(out.fileno(), 0o644)
        Path(name).rename(file)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file)
        raise
    return size


class _Advancing:
    """Tells a task of what is written."""

    def __init__(self, out: BinaryIO, advance: object) -> None:
        self._write, self._advance = out.write, advance

    def write(self, data: bytes) -> int:
        count = self._write(data)
        if callable(self._advance):
            self._advance(count)
        return count
