"""`erofs-builder check`: every byte of an artifact against every digest and table that speaks of it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

from erofs_builder.contents import Contents, Piece
from erofs_builder.digest import Digest
from erofs_builder.erofs.flat import decode_frame
from erofs_builder.errors import ErofsError, IntegrityError
from erofs_builder.fingerprint import fingerprint
from erofs_builder.frames import BLOCK, Frame, FrameTable
from erofs_builder.hints_codec import decode_hints
from erofs_builder.model import Blob, Node
from erofs_builder.payload import Form
from erofs_builder.tree import walk
from loader.artifact import Artifact
from loader.convert.load import load_contents
from loader.convert.progress import Progress, Task
from loader.convert.survey import Tree, inodes, load_tree, show_path, some_form
from loader.errors import LoaderError, NotFoundError, TransientRegistryError
from loader.registry.base import Descriptor, ImageSource
from loader.registry.client import Registry

_MAX_PATHS = 5  # named behind one bad frame
_AHEAD = 8  # frames in work at once


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it should be, and the files that it hits (some of `files`, in paths)."""

    blob: Digest
    frame: int | None
    message: str
    files: int = 0
    paths: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """What was checked, and what was found wrong."""

    inodes: int = 0
    blobs: int = 0
    frames: int = 0
    bytes: int = 0
    pieces: int = 0
    fingerprints: int = 0
    forms: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)


def check_artifact(source: ImageSource, artifact: Artifact, progress: Progress, threads: int = 2) -> Report:
    """Check everything. Malformed documents raise (ArtifactError, FrameTableError, ErofsError, IntegrityError);

    damaged data is collected in the report, so that one run names it all.
    """
    report = Report()
    some_form(artifact)
    trees = {form: load_tree(source, artifact, form) for form in artifact.metadata}
    report.forms = [form.value for form in trees]
    _compare_forms(trees)
    tree = next(iter(trees.values()))
    if tree.payload.hints:
        decode_hints(tree.payload.hints, tree.payload.tables)
    report.inodes = sum(1 for _ in inodes(tree.root))
    pieces = _pieces_by_frame(source, artifact, tree)
    report.fingerprints = _check_fingerprints(tree, pieces)
    with ThreadPoolExecutor(threads) as pool:
        for number, descriptor in enumerate(artifact.blobs):
            table = tree.payload.tables[number]
            check = _BlobCheck(report, descriptor, table, pieces[number], pool)
            with progress.task(
                f"blob {number + 1}/{len(artifact.blobs)} {descriptor.digest.hex[:12]}", descriptor.size
            ) as task:
                check.run(source, task)
    if report.damage:
        report.damage = _name_files(report.damage, tree)
    return report


def _compare_forms(trees: dict[Form, Tree]) -> None:
    """Both forms must show the same tree over the same places."""
    if len(trees) < 2:
        return
    first, second = trees.values()
    if [table.encode() for table in first.payload.tables] != [table.encode() for table in second.payload.tables]:
        raise IntegrityError("the two forms' frame tables differ")
    if first.payload.hints != second.payload.hints:
        raise IntegrityError("the two forms' hints differ")
    numbers = {blob: number for tree in (first, second) for number, blob in enumerate(tree.blobs)}
    one, other = walk(first.root), walk(second.root)
    for (path, node), (path2, node2) in zip(one, other, strict=False):
        if path != path2 or _facts(node, numbers) != _facts(node2, numbers):
            raise ErofsError(f"the two forms differ at {show_path(min(path, path2))}")
    if next(one, None) is not None or next(other, None) is not None:
        raise ErofsError("the two forms' trees differ in length")


def _facts(node: Node, numbers: dict[Blob, int]) -> tuple[object, ...]:
    own = (node.mode, node.uid, node.gid, node.mtime, node.mtime_nsec, node.size, node.target, node.rdev, node.xattrs)
    return (*own, node.fingerprint, tuple(_places(node, numbers)))


def _places(node: Node, numbers: dict[Blob, int]) -> Iterator[tuple[int, int, int]]:
    """A file's bytes as (blob, place in the decoded blob, length), neighbours joined: forms cut them differently."""
    pending: tuple[int, int, int] | None = None
    for extent in node.extents:
        if extent.blob is None:
            number, start = -1, 0
        else:
            assert extent.blob.table is not None
            number = numbers[extent.blob]
            start = extent.blob.table[extent.frame].decoded_offset + extent.frame_offset
        if pending and pending[0] == number and number in (-1, number) and (number < 0 or sum(pending[1:]) == start):
            pending = (number, pending[1], pending[2] + extent.length)
            continue
        if pending:
            yield pending
        pending = (number, start, extent.length)
    if pending:
        yield pending


def _pieces_by_frame(source: ImageSource, artifact: Artifact, tree: Tree) -> list[dict[int, list[Piece]]]:
    """For each blob, what its content index says of each frame."""
    if artifact.contents is None:
        return [{} for _ in artifact.blobs]
    index: dict[Digest, Contents] = dict(load_contents(source, artifact))
    found: list[dict[int, list[Piece]]] = []
    for table in tree.payload.tables:
        frames: dict[int, list[Piece]] = {}
        for piece in index[table.blob_digest]:
            if piece.frame >= len(table) or piece.offset + piece.length > table[piece.frame].decoded_size:
                raise IntegrityError(f"content index: a piece beyond frame {piece.frame} of blob {table.blob_digest}")
            frames.setdefault(piece.frame, []).append(piece)
        found.append(frames)
    return found


def _check_fingerprints(tree: Tree, pieces: list[dict[int, list[Piece]]]) -> int:
    """Hold files' fingerprints against the pieces that they are made of, whose digests are checked elsewhere; how many.

    Not those of files that a rebuilt layout has cut otherwise: which pieces they were made of is not in the artifact.
    """
    count = 0
    digests = [
        {(piece.frame, piece.offset, piece.length): piece.digest for found in frames.values() for piece in found}
        for frames in pieces
    ]
    numbers = {blob: number for number, blob in enumerate(tree.blobs)}
    for path, node in inodes(tree.root):
        if not node.fingerprint:
            continue
        parts: list[tuple[int, bytes | None]] = []
        for extent in node.extents:
            found = digests[numbers[extent.blob]] if extent.blob is not None else {}
            parts.append((extent.length, found.get((extent.frame, extent.frame_offset, extent.length))))
        if any(extent.blob and digest is None for extent, (_, digest) in zip(node.extents, parts, strict=True)):
            continue
        if fingerprint(parts) != node.fingerprint:
            raise IntegrityError(f"{show_path(path)}: its fingerprint is not that of its content")
        count += 1
    return count


class _BlobCheck:
    """One blob: a single pass over its bytes, frames checked in threads."""

    def __init__(
        self,
        report: Report,
        descriptor: Descriptor,
        table: FrameTable,
        pieces: dict[int, list[Piece]],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._report, self._descriptor, self._table = report, descriptor, table
        self._pieces, self._pool = pieces, pool
        self._pending: deque[tuple[Frame, Future[str | None]]] = deque()

    def run(self, source: ImageSource, task: Task) -> None:
        self._report.blobs += 1
        known = len(self._report.damage)
        try:
            with source.open_blob(self._descriptor) as stream:
                self._read_frames(stream, task)
        except (IntegrityError, NotFoundError) as error:
            # Where frames were named already, that the whole has another digest is no news.
            if len(self._report.damage) == known:
                self._found(None, str(error))
        except TransientRegistryError as error:
            if isinstance(source, Registry):
                raise
            self._found(None, str(error))

    def _read_frames(self, stream: BinaryIO, task: Task) -> None:
        try:
            for frame in self._table:
                data = stream.read(frame.encoded_size)
                if len(data) != frame.encoded_size:
                    self._found(frame.number, f"cut off after {len(data)} of {frame.encoded_size} bytes")
                    return
                self._pending.append((frame, self._pool.submit(self._frame_problem, frame, data)))
                task.advance(len(data))
                self._settle(_AHEAD)
        finally:
            self._settle(0)
        if stream.read(1):
            self._found(None, "bytes behind the last frame")

    def _settle(self, most: int) -> None:
        while len(self._pending) > most:
            frame, future = self._pending.popleft()
            problem = future.result()
            self._report.frames += 1
            self._report.bytes += frame.encoded_size
            self._report.pieces += len(self._pieces.get(frame.number, ()))
            if problem:
                self._found(frame.number, problem)

    def _frame_problem(self, frame: Frame, data: bytes) -> str | None:
        """What is wrong with a frame; runs in a thread."""
        found = hashlib.sha256(data).digest()
        if found != frame.digest:
            return f"expected sha256 {frame.digest.hex()}, got {found.hex()}"
        try:
            content = decode_frame(data, frame, str(self._descriptor.digest))
        except IntegrityError as error:
            return str(error)
        for piece in self._pieces.get(frame.number, ()):
            part = content[piece.offset : piece.offset + piece.length]
            if hashlib.sha256(part).digest() != piece.digest:
                return f"content index: bytes {piece.offset}+{piece.length} of the frame are not {piece.digest.hex()}"
            if any(content[piece.offset + piece.length : -(-(piece.offset + piece.length) // BLOCK) * BLOCK]):
                return f"the padding behind byte {piece.offset + piece.length} of the frame is not zero"
        return None

    def _found(self, frame: int | None, message: str) -> None:
        self._report.damage.append(Damage(self._descriptor.digest, frame, message))


def _name_files(damage: list[Damage], tree: Tree) -> list[Damage]:
    """The same findings with the files that lie in the damaged frames (or anywhere in a damaged blob)."""
    hits: dict[tuple[Digest, int | None], list[bytes]] = {(item.blob, item.frame): [] for item in damage}
    for path, node in inodes(tree.root):
        touched = {
            key
            for extent in node.extents
            if extent.blob is not None
            for key in ((extent.blob.digest, extent.frame), (extent.blob.digest, None))
        }
        for key in touched & hits.keys():
            hits[key].append(path)
    return [
        Damage(item.blob, item.frame, item.message, len(paths), tuple(show_path(path) for path in paths[:_MAX_PATHS]))
        for item in damage
        for paths in (hits[item.blob, item.frame],)
    ]


def check_failed(report: Report) -> LoaderError | IntegrityError:
    """The error that a report with damage ends with."""
    frames = sum(1 for item in report.damage if item.frame is not None)
    return IntegrityError(f"{frames} damaged frames, {len(report.damage) - frames} other findings")
