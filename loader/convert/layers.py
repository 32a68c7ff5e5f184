"""One source layer → its data blob in a file, checked against its digest and diff_id on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from erofs_builder.decompress import is_compressed, plain_chunks
from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.hot import Sha256
from erofs_builder.layer import Layer, Options, build_layer
from erofs_builder.pieces import Base
from loader.convert.progress import Task
from loader.convert.source import SourceLayer
from loader.registry.base import ImageSource
from loader.registry.streams import VerifyingReader


def convert_layer(
    source: ImageSource, layer: SourceLayer, out: BinaryIO, options: Options, base: Base | None, task: Task
) -> Layer:
    """Stream a layer through `build_layer`. IntegrityError if its bytes are not those of the image's documents."""
    digest = layer.descriptor.digest
    with source.open_blob(layer.descriptor) as blob:
        try:
            stream = _PlainTar(blob, layer, task)
            built = build_layer(stream, out, base=base, options=options, whole=stream.whole)
        except FormatError as error:
            raise type(error)(f"layer {digest}: {error}") from None
    stream.verify()
    return built


class _PlainTar:
    """A layer's plain tar; counts compressed bytes.

    `whole`, where it is set, is to take in what is read: the builder does that beside digests of its own.
    """

    def __init__(self, blob: BinaryIO, layer: SourceLayer, task: Task) -> None:
        self._layer = layer
        # The buffered layer of the stream would only copy.
        raw = getattr(blob, "raw", blob)
        counted = _Counted(raw, task)
        self._chunks: Iterator[bytes] = plain_chunks(counted)
        self._rest = next(self._chunks, b"")
        same = layer.descriptor.digest == layer.diff_id
        self.whole: Sha256 | None = None
        self._hash: Sha256 | None = None
        if same and isinstance(raw, VerifyingReader) and not is_compressed(counted.head):
            # A plain tar's digest is its diff_id.
            raw.leave_digest()
            self.whole = Sha256()
        elif not same:
            # Compressed twice: the builder sees other bytes than those of the diff_id.
            self._hash = Sha256()
            if not is_compressed(self._rest):
                self.whole, self._hash = self._hash, None

    def read(self, size: int, /) -> bytes:
        data = self._rest or next(self._chunks, b"")
        self._rest = data[size:]
        if self._rest:
            data = data[:size]
        if self._hash is not None:
            self._hash.update(data)
        return data

    def verify(self) -> None:
        """After the builder has read all of it."""
        while self.read(1 << 20):
            pass
        known = self.whole or self._hash
        if known is not None and (found := Digest(known.digest())) != self._layer.diff_id:
            expected = self._layer.diff_id
            raise IntegrityError(
                f"layer {self._layer.descriptor.digest}: its tar is {found}, the image's config says {expected}"
            )


class _Counted:
    def __init__(self, raw: BinaryIO, task: Task) -> None:
        self._raw, self._task = raw, task
        self.head = b""

    def read(self, size: int, /) -> bytes:
        data = self._raw.read(size)
        if len(self.head) < 4:
            self.head += data[:4]
        self._task.advance(len(data))
        return data


def blob_path(directory: Path, number: int) -> Path:
    """Where the blob of the layer with this number is written."""
    return directory / f"blob-{number}"
