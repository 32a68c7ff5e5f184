"""One source layer → its data blob in a file, checked against its digest and diff_id on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from erofs_builder.decompress import plain_chunks
from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.layer import Layer, Options, build_layer
from erofs_builder.pieces import Base
from loader.convert.progress import Task
from loader.convert.source import SourceLayer
from loader.registry.base import ImageSource


def convert_layer(
    source: ImageSource, layer: SourceLayer, out: BinaryIO, options: Options, base: Base | None, task: Task
) -> Layer:
    """Stream a layer through `build_layer`. IntegrityError if its bytes are not those of the image's documents."""
    digest = layer.descriptor.digest
    with source.open_blob(layer.descriptor) as blob:
        stream = _PlainTar(blob, layer, task)
        try:
            built = build_layer(stream, out, base=base, options=options)
        except FormatError as error:
            raise type(error)(f"layer {digest}: {error}") from None
    stream.verify()
    return built


class _PlainTar:
    """A layer's plain tar, hashed where its digest does not say the same already; counts compressed bytes."""

    def __init__(self, blob: BinaryIO, layer: SourceLayer, task: Task) -> None:
        self._layer = layer
        # The buffered layer of the stream would only copy.
        self._chunks: Iterator[bytes] = plain_chunks(_Counted(getattr(blob, "raw", blob), task))
        # A plain tar's digest is its diff_id, and open_blob checks that one.
        self._hash = None if layer.descriptor.digest == layer.diff_id else hashlib.sha256()
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        data = self._rest or next(self._chunks, b"")
        self._rest = data[size:]
        if self._rest:
            data = data[:size]
        if self._hash is not None:
            self._hash.update(data)
        return data

    def verify(self) -> None:
        while self.read(1 << 20):
            pass
        if self._hash is not None and (found := Digest(self._hash.digest())) != self._layer.diff_id:
            expected = self._layer.diff_id
            raise IntegrityError(
                f"layer {self._layer.descriptor.digest}: its tar is {found}, the image's config says {expected}"
            )


class _Counted:
    def __init__(self, raw: BinaryIO, task: Task) -> None:
        self._raw, self._task = raw, task

    def read(self, size: int, /) -> bytes:
        data = self._raw.read(size)
        self._task.advance(len(data))
        return data


def blob_path(directory: Path, number: int) -> Path:
    """Where the blob of the layer with this number is written."""
    return directory / f"blob-{number}"
