"""Packer: files' contents in, frames of a data blob out; says for each file where its bytes are.

- Files up to one piece are packed into frames with others of their kind, at 4 KiB boundaries; larger ones are cut at
  multiples of the kind's piece size, each piece a frame of its own, so that an appended or patched file keeps
  the pieces that stayed. The last piece takes what is left, from half to one and a half of a piece.
- Content that the blob, or one of the base's, holds already is not stored again: whole small files and pieces are
  known by sha256.
- Files and pieces of nothing but zeros are holes, whether the archive calls the file sparse or not.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from erofs_builder.blob import BlobWriter, Buffer
from erofs_builder.contents import Contents
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.frames import BLOCK, FrameTable
from erofs_builder.kinds import SMALLEST_PIECE, Kind, classify
from erofs_builder.model import Blob, Extent
from erofs_builder.pax import Segments

EMPTY_DIGEST = hashlib.sha256(b"").digest()
_ZEROS = bytes(1 << 20)
_HOLE = -1

Read = Callable[[int], Buffer]


class BasePiece(NamedTuple):
    """A piece that a blob of the base holds."""

    blob: Blob
    frame: int
    offset: int  # bytes
    length: int


Base = Mapping[bytes, BasePiece]  # sha256 → where


def base_pieces(index: Iterable[tuple[Digest, Contents]], blobs: Mapping[Digest, Blob]) -> Base:
    """What the base's blobs hold, for `Packer`: its content index, and its blobs (complete, `from_base`) by digest.

    ArtifactError if the index names places that a blob's frame table does not have. Blobs that the index names and the
    base does not have are passed over.
    """
    found: dict[bytes, BasePiece] = {}
    for digest, contents in index:
        blob = blobs.get(digest)
        if blob is None or blob.table is None:
            continue
        for piece in contents:
            if piece.frame >= len(blob.table) or piece.offset + piece.length > blob.table[piece.frame].decoded_size:
                raise ArtifactError(f"content index: blob {digest} has no {piece.length} bytes in frame {piece.frame}")
            known = found.get(piece.digest)
            if known is None or (known.offset and not piece.offset):
                found[piece.digest] = BasePiece(blob, piece.frame, piece.offset, piece.length)
    return found


class FileRef(NamedTuple):
    """Where a file's bytes are, while the blob is written: its pieces by number, or _HOLE, and their lengths."""

    runs: tuple[int, ...]
    lengths: tuple[int, ...]
    digest: bytes | None  # of files that are one piece; to hash the others whole too would hash most bytes twice


class _Bin:
    """A frame in the making."""

    __slots__ = ("content", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.content = bytearray()


class Packer:
    """Cuts and packs one layer's files into `writer`'s frames. Bounded: one open frame per kind, 50 bytes a piece."""

    def __init__(self, writer: BlobWriter, base: Base | None = None) -> None:
        self._writer = writer
        self._base = base or {}
        self._bins: dict[Kind, _Bin] = {}
        self._bin_count = 0
        self._bin_frames: dict[int, int] = {}  # a bin's number → its frame's
        self._known: dict[bytes, int] = {}
        self._known_at_start: dict[bytes, int] = {}  # second copies of content that is known inside a frame only
        self._frames = array("q")  # of a piece; -1 - bin while that is open; base pieces: 0
        self._offsets = array("I")
        self._lengths = array("I")
        self._digests = bytearray()
        self._in_base: dict[int, BasePiece] = {}

    def store(self, path: bytes, size: int, head: bytes, read: Read, segments: Segments | None = None) -> FileRef:
        """Take in one file. `read(n)` gives its next n stored bytes; with `segments`, only those are stored."""
        if size == 0:
            return FileRef((), (), EMPTY_DIGEST)
        kind = classify(path, head)
        if size <= SMALLEST_PIECE or size <= kind.piece + kind.piece // 2:
            data = read(size) if segments is None else _assemble(0, size, iter(segments), read)
            digest = hashlib.sha256(data).digest()
            if _is_zero(data):
                return FileRef((_HOLE,), (size,), digest)
            return FileRef((self._piece(data, digest, kind, packed=True),), (size,), digest)
        return self._store_pieces(size, kind, read, segments)

    def _store_pieces(self, size: int, kind: Kind, read: Read, segments: Segments | None) -> FileRef:
        runs: list[int] = []
        lengths: list[int] = []
        for length, data in cut(size, kind.piece, read, segments):
            if data is None or _is_zero(data):
                if runs and runs[-1] < 0:
                    lengths[-1] += length
                    continue
                runs.append(_HOLE)
            else:
                runs.append(self._piece(data, hashlib.sha256(data).digest(), kind, packed=False))
            lengths.append(length)
        return FileRef(tuple(runs), tuple(lengths), None)

    def _piece(self, data: Buffer, digest: bytes, kind: Kind, *, packed: bool) -> int:
        """The number of the piece with this content, stored now unless it is there already."""
        known = self._known.get(digest)
        if known is None:
            known = self._base_piece(digest, len(data))
        if known is not None and not packed and self._offsets[known]:
            known = self._known_at_start.get(digest)  # a piece of a cut file must start its frame
        if known is not None:
            return known
        number = len(self._lengths)
        size = len(data)
        if packed and size <= kind.bin // 2:
            frame, offset = self._pack(data, kind)
        else:
            frame, offset = self._writer.add(_padded(data)), 0
        self._note(frame, offset, size, digest)
        if digest in self._known:
            self._known_at_start[digest] = number
        else:
            self._known[digest] = number
        return number

    def _note(self, frame: int, offset: int, size: int, digest: bytes) -> None:
        self._frames.append(frame)
        self._offsets.append(offset)
        self._lengths.append(size)
        self._digests += digest

    def _base_piece(self, digest: bytes, size: int) -> int | None:
        piece = self._base.get(digest)
        if piece is None or piece.length != size:
            return None
        number = len(self._lengths)
        self._note(piece.frame, piece.offset, size, digest)
        self._in_base[number] = piece
        self._known[digest] = number
        return number

    def _pack(self, data: Buffer, kind: Kind) -> tuple[int, int]:
        size = len(data)
        current = self._bins.get(kind)
        if current is not None and len(current.content) + size > kind.bin:
            self._close(current)
            current = None
        if current is None:
            current = self._bins[kind] = _Bin(self._bin_count)
            self._bin_count += 1
        offset = len(current.content)
        current.content += data
        if tail := -size % BLOCK:
            current.content += _ZEROS[:tail]
        return -1 - current.number, offset

    def _close(self, full: _Bin) -> None:
        if len(full.content) == BLOCK:
            full.content += _ZEROS[:BLOCK]  # incompressible, one block of content would take two (see model.Extent)
        self._bin_frames[full.number] = self._writer.add(full.content)

    def finish(self) -> FrameTable | None:
        """Write the open frames; the blob's table, or None when it holds nothing."""
        for current in self._bins.values():
            self._close(current)
        self._bins.clear()
        for number, frame in enumerate(self._frames):
            if frame < 0:
                self._frames[number] = self._bin_frames[-1 - frame]
        return self._writer.finish() if len(self._writer) else None

    def contents(self) -> Contents:
        """What this blob holds (not what the base's do). After `finish`."""
        contents = Contents()
        for number, (frame, offset, length) in enumerate(zip(self._frames, self._offsets, self._lengths, strict=True)):
            if number not in self._in_base:
                contents.append(bytes(self._digests[32 * number : 32 * number + 32]), frame, offset, length)
        return contents

    def extents(self, blob: Blob) -> Callable[[FileRef], tuple[Extent, ...]]:
        """A function from a file to its extents, the same tuple for the same single piece. After `finish`."""
        single: dict[int, tuple[Extent, ...]] = {}

        def extent(run: int, length: int) -> Extent:
            if run < 0:
                return Extent(None, 0, 0, length)
            piece = self._in_base.get(run)
            return Extent(piece.blob if piece else blob, self._frames[run], self._offsets[run], length)

        def extents(file: FileRef) -> tuple[Extent, ...]:
            if len(file.runs) != 1:
                return tuple(map(extent, file.runs, file.lengths))
            run = file.runs[0]
            if run < 0:
                return (extent(run, file.lengths[0]),)
            if run not in single:
                single[run] = (extent(run, file.lengths[0]),)
            return single[run]

        return extents


def cut(size: int, piece: int, read: Read, segments: Segments | None) -> Iterator[tuple[int, Buffer | None]]:
    """A file's pieces in order as (length, bytes); None instead of bytes for one or more pieces in a hole."""
    count = max((size + piece // 2) // piece, 1)
    if segments is None:
        for _ in range(count - 1):
            yield piece, read(piece)
        yield size - (count - 1) * piece, read(size - (count - 1) * piece)
        return
    index = 0
    cursor = _Segments(segments, read)
    while index < count:
        start = index * piece
        data_at = cursor.next_offset()
        empty = count - index if data_at is None else min((data_at - start) // piece, count - 1 - index)
        if empty > 0:
            end = size if index + empty == count else start + empty * piece
            yield end - start, None
            index += empty
            continue
        end = size if index == count - 1 else start + piece
        yield end - start, cursor.assemble(start, end)
        index += 1


class _Segments:
    """A position in a sparse file's map."""

    def __init__(self, segments: Segments, read: Read) -> None:
        self._left = iter(segments)
        self._read = read
        self._offset, self._length = next(self._left, (0, 0))

    def next_offset(self) -> int | None:
        """Where the next data byte lies; None when there is no more."""
        return self._offset if self._length else None

    def assemble(self, start: int, end: int) -> bytearray:
        """The file's bytes from start to end, with zeros where it has none."""
        content = bytearray(end - start)
        while self._length and self._offset < end:
            step = min(self._length, end - self._offset)
            at = self._offset - start
            content[at : at + step] = self._read(step)
            self._offset += step
            self._length -= step
            if not self._length:
                self._offset, self._length = next(self._left, (0, 0))
        return content


def _assemble(start: int, end: int, segments: Iterator[tuple[int, int]], read: Read) -> bytearray:
    return _Segments(tuple(segments), read).assemble(start, end)


def _padded(data: Buffer) -> Buffer:
    tail = -len(data) % BLOCK
    return b"".join((data, _ZEROS[:tail])) if tail else data


def _is_zero(data: Buffer) -> bool:
    size = len(data)
    return size >= BLOCK and data[0] == 0 and data[size - 1] == 0 and _ZEROS.startswith(data)
