"""The pieces of one layer: which content lies where, in its own blob or in one of the base's.

A piece is a whole small file, or one frame's worth of a larger one, known by the sha256 of its bytes. Columns
instead of objects: 160 bytes a piece, most of it the lookup by digest.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from erofs_builder.contents import Contents
from erofs_builder.digest import Digest
from erofs_builder.errors import ArtifactError
from erofs_builder.fingerprint import fingerprint
from erofs_builder.model import Blob, Extent

HOLE = -1


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


class CutFile(NamedTuple):
    """A file of several pieces: their numbers, or HOLE, and their lengths."""

    runs: tuple[int, ...]
    lengths: tuple[int, ...]


# Where a file's bytes are, while the blob is written: the number of its only piece, HOLE, or several of them.
FileRef = int | CutFile


class Pieces:
    """Filled while the blob is written; `settle` ends that."""

    def __init__(self) -> None:
        # By 48 bits of the digest, and by all of it where others begin alike: 48 bytes a piece fewer.
        self._known: dict[int, int] = {}
        self._alike: dict[bytes, int] = {}
        self._known_at_start: dict[bytes, int] = {}  # second copies of content that is known inside a frame only
        self._frames = array("q")  # of a piece; -1 - bin while that is open
        self._offsets = array("I")
        self._lengths = array("I")
        self._digests = bytearray()
        self._held: dict[int, BasePiece] = {}  # pieces of the base's

    def __len__(self) -> int:
        return len(self._frames)

    def find(self, digest: bytes, *, at_start: bool) -> int | None:
        """The piece with this content; `at_start`: one that begins its frame, as a cut file's pieces must."""
        known = self._known.get(int.from_bytes(digest[:6], "big"))
        if known is None:
            return None
        if self.digest(known) != digest:
            known = self._alike.get(digest)
        if known is not None and at_start and self._offsets[known]:
            return self._known_at_start.get(digest)
        return known

    def add(self, digest: bytes, frame: int, offset: int, length: int) -> int:
        """Note a piece in a frame, or (negative: -1 - its number) in a bin that has no frame yet."""
        number = len(self._frames)
        self._frames.append(frame)
        self._offsets.append(offset)
        self._lengths.append(length)
        self._digests += digest
        first = self._known.setdefault(int.from_bytes(digest[:6], "big"), number)
        if first != number:
            if digest in self._alike or self.digest(first) == digest:
                self._known_at_start[digest] = number
            else:
                self._alike[digest] = number
        return number

    def add_held(self, digest: bytes, piece: BasePiece) -> int:
        """Note a piece that a blob of the base holds."""
        number = self.add(digest, piece.frame, piece.offset, piece.length)
        self._held[number] = piece
        return number

    def settle(self, bin_frames: Mapping[int, int]) -> None:
        """Nothing more comes: bins have become the frames in `bin_frames`."""
        self._known.clear()
        self._alike.clear()
        self._known_at_start.clear()
        for number, frame in enumerate(self._frames):
            if frame < 0:
                self._frames[number] = bin_frames[-1 - frame]

    def digest(self, number: int) -> bytes:
        """The sha256 of a piece."""
        return bytes(self._digests[32 * number : 32 * number + 32])

    def fingerprint(self, file: FileRef, size: int) -> bytes:
        """The fingerprint of a file's content (b"" of an empty one)."""
        if isinstance(file, CutFile) and not file.runs:
            return b""
        runs, lengths = (file.runs, file.lengths) if isinstance(file, CutFile) else ((file,), (size,))
        digests = [None if run == HOLE else self.digest(run) for run in runs]
        return fingerprint(zip(lengths, digests, strict=True))

    def contents(self) -> Contents:
        """What the blob itself holds. After `settle`."""
        contents = Contents()
        if not self._held:
            contents.extend(self._digests, self._frames, self._offsets, self._lengths)
            return contents
        for number, (frame, offset, length) in enumerate(zip(self._frames, self._offsets, self._lengths, strict=True)):
            if number not in self._held:
                contents.append(self.digest(number), frame, offset, length)
        return contents

    def locate(self, blob: Blob) -> Callable[[FileRef, int], tuple[Extent, ...]]:
        """A function from a file and its size to its extents, shared by files of one content. After `settle`."""
        single: list[tuple[Extent, ...] | None] = [None] * len(self)
        equal: dict[int, int] = {}  # many files share a frame, or an offset: 64 bytes a file fewer

        def extent(number: int, length: int) -> Extent:
            if number == HOLE:
                return Extent(None, 0, 0, length)
            held = self._held.get(number)
            frame, offset = self._frames[number], self._offsets[number]
            return Extent(
                held.blob if held else blob, equal.setdefault(frame, frame), equal.setdefault(offset, offset), length
            )

        def locate(file: FileRef, size: int) -> tuple[Extent, ...]:
            if isinstance(file, CutFile):
                return tuple(map(extent, file.runs, file.lengths))
            if file == HOLE:
                return (extent(HOLE, size),)
            found = single[file]
            if found is None:
                found = single[file] = (extent(file, size),)
            return found

        return locate
