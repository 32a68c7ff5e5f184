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
from collections.abc import Callable, Iterator, Sequence

from erofs_builder.blob import BlobWriter, Buffer
from erofs_builder.frames import BLOCK, FrameTable
from erofs_builder.hot import sha256_many
from erofs_builder.kinds import Kind, classify
from erofs_builder.pax import Segments
from erofs_builder.pieces import HOLE, Base, CutFile, FileRef, Pieces

_ZEROS = bytes(1 << 20)

Read = Callable[[int], Buffer]
Hash = Callable[[Buffer, Sequence[tuple[int, int]]], list[bytes]]


EMPTY = CutFile((), ())
_SHORTEST_BIN = 16 * BLOCK
_TOGETHER = 2  # pieces that are hashed in one call


class _Bin:
    """A frame in the making: `used` bytes of its content, and zeros. It never grows: that would copy it ever again."""

    __slots__ = ("content", "kind", "number", "used")

    def __init__(self, number: int, kind: Kind) -> None:
        self.number = number
        self.kind = kind
        self.content = memoryview(bytearray(kind.bin))
        self.used = 0


class Packer:
    """Cuts and packs one layer's files into `writer`'s frames. Bounded: one open frame per kind, 50 bytes a piece."""

    def __init__(self, writer: BlobWriter, base: Base | None = None) -> None:
        self._writer = writer
        self._base = base or {}
        self._bins: dict[str, _Bin] = {}  # by the kind's name
        self._bin_count = 0
        self._bin_frames: dict[int, int] = {}  # a bin's number → its frame's
        self.pieces = Pieces()

    def store(
        self,
        path: bytes,
        size: int,
        head: bytes,
        read: Read,
        segments: Segments | None = None,
        digest: bytes | None = None,
        hash_many: Hash = sha256_many,
    ) -> FileRef:
        """Take in one file. `read(n)` gives its next n stored bytes; with `segments`, only those are stored.

        `digest` is the sha256 of the whole content, where the caller has it; `hash_many` gives those of parts.
        """
        if size == 0:
            return EMPTY
        kind = classify(path, head, size)
        if size <= kind.piece + kind.piece // 2:
            data = read(size) if segments is None else _Segments(segments, read).assemble(0, size)
            if _is_zero(data):
                return HOLE
            return self._piece(data, digest or hash_many(data, [(0, size)])[0], kind, packed=True)
        return self._store_pieces(size, kind, read, segments, hash_many)

    def _store_pieces(self, size: int, kind: Kind, read: Read, segments: Segments | None, hash_many: Hash) -> FileRef:
        runs: list[int] = []
        lengths: list[int] = []
        if segments is not None:
            pieces = cut_sparse(size, kind.piece, read, segments)
        else:
            pieces = cut(size, kind.piece, read, hash_many)
        for length, data, digest in pieces:
            if data is None or _is_zero(data):
                if runs and runs[-1] < 0:
                    lengths[-1] += length
                    continue
                runs.append(HOLE)
            else:
                runs.append(self._piece(data, digest, kind, packed=False))
            lengths.append(length)
        return CutFile(tuple(runs), tuple(lengths))

    def _piece(self, data: Buffer, digest: bytes, kind: Kind, *, packed: bool) -> int:
        """The number of the piece with this content, stored now unless it is there already."""
        known = self.pieces.find(digest, at_start=not packed)
        if known is not None:
            return known
        size = len(data)
        held = self._base.get(digest)
        if held is not None and held.length == size and (packed or not held.offset):
            return self.pieces.add_held(digest, held)
        if packed and size <= kind.bin // 2:
            frame, offset = self._pack(data, kind)
        else:
            frame, offset = self._writer.add(_padded(data), prose=kind.prose), 0
        return self.pieces.add(digest, frame, offset, size)

    def _pack(self, data: Buffer, kind: Kind) -> tuple[int, int]:
        size = len(data)
        current = self._bins.get(kind.name)
        if current is None or current.used + size > len(current.content):
            if current is not None:
                self._close(current)
            current = self._bins[kind.name] = _Bin(self._bin_count, kind)
            self._bin_count += 1
        offset = current.used
        current.content[offset : offset + size] = data
        current.used = offset + size + -size % BLOCK
        return -1 - current.number, offset

    def _close(self, full: _Bin) -> None:
        # Zeros cost nothing, and the packed inode's index has a record for as many blocks as its shortest frame allows.
        # (And incompressible, one block of content would take two, which no record can say: see model.Extent.)
        content = full.content[: max(full.used, _SHORTEST_BIN)]
        self._bin_frames[full.number] = self._writer.add(content, prose=full.kind.prose)

    def finish(self) -> FrameTable | None:
        """Write the open frames; the blob's table, or None when it holds nothing."""
        for current in self._bins.values():
            self._close(current)
        self._bins.clear()
        self.pieces.settle(self._bin_frames)
        return self._writer.finish() if len(self._writer) else None


# A piece: length, bytes, sha256 of them. No bytes: one or more pieces in a hole.
_Cut = tuple[int, Buffer | None, bytes]


def cut(size: int, piece: int, read: Read, hash_many: Hash = sha256_many) -> Iterator[_Cut]:
    """A file's pieces in order."""
    count = max((size + piece // 2) // piece, 1)
    for first in range(0, count, _TOGETHER):
        behind = min(first + _TOGETHER, count)
        data = memoryview(read((size if behind == count else behind * piece) - first * piece))
        places = [(at, piece) for at in range(0, (behind - first) * piece, piece)]
        places[-1] = places[-1][0], len(data) - places[-1][0]
        for (offset, length), digest in zip(places, hash_many(data, places), strict=True):
            yield length, data[offset : offset + length], digest


def cut_sparse(size: int, piece: int, read: Read, segments: Segments) -> Iterator[_Cut]:
    """The same of a file of which only `segments` are stored."""
    count = max((size + piece // 2) // piece, 1)
    index = 0
    cursor = _Segments(segments, read)
    while index < count:
        start = index * piece
        data_at = cursor.next_offset()
        empty = count - index if data_at is None else min((data_at - start) // piece, count - 1 - index)
        if empty > 0:
            end = size if index + empty == count else start + empty * piece
            yield end - start, None, b""
            index += empty
            continue
        end = size if index == count - 1 else start + piece
        data = cursor.assemble(start, end)
        yield end - start, data, hashlib.sha256(data).digest()
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


def _padded(data: Buffer) -> Buffer:
    tail = -len(data) % BLOCK
    return b"".join((data, _ZEROS[:tail])) if tail else data


def _is_zero(data: Buffer) -> bool:
    size = len(data)
    return size >= BLOCK and data[0] == 0 and data[size - 1] == 0 and _ZEROS.startswith(data)
