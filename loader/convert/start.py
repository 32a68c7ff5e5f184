"""What an image's start reads: the list of its frames, or a blob rebuilt for it, made while the blobs are at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path

from erofs_builder.command import Command
from erofs_builder.digest import Digest
from erofs_builder.erofs.flat import decode_frame
from erofs_builder.errors import IntegrityError
from erofs_builder.followers import Follower, encode_followers
from erofs_builder.frame_list import Place, encode_frames
from erofs_builder.import_followers import import_followers
from erofs_builder.import_graph import ImportGraph
from erofs_builder.model import Blob, Node
from erofs_builder.plug_ins import plug_in_followers
from erofs_builder.python_program import PythonProgram, python_program
from erofs_builder.python_tree import find_modules
from erofs_builder.startup import Start
from loader.artifact import FOLLOWERS_ANNOTATION, START_ANNOTATION
from loader.errors import LoaderError
from loader.registry.base import ImageSource

log = logging.getLogger(__name__)


def frame_reader(files: Mapping[Digest, Path], base: ImageSource | None = None) -> Callable[[Blob, int], bytes]:
    """Reads frames of blobs, from `files` or else from the base's source. KeyError: it is in neither."""

    def read_frame(blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame, digest = blob.table[number], blob.digest
        if digest in files:
            with files[digest].open("rb") as file:
                file.seek(frame.encoded_offset)
                data = file.read(frame.encoded_size)
        elif base is not None and blob.from_base:
            data = base.read_range(digest, frame.encoded_offset, frame.encoded_size)
            Digest(frame.digest).verify(data, f"frame {number} of {digest}")
        else:
            raise KeyError(digest)
        return decode_frame(data, frame, str(digest))

    return read_frame


def start_list(
    root: Node, blobs: Sequence[Blob], command: Command, read_frame: Callable[[Blob, int], bytes]
) -> dict[str, str]:
    """The artifact's annotations: the list of the start, and what follows the first read of plug-ins and packages."""
    numbers = {blob: number for number, blob in enumerate(blobs)}
    start = Start(root, command, _at_hand(read_frame))
    places = [(numbers[blob], frame) for blob, frame in start.frames() if blob in numbers]
    followers: list[Follower] = []
    if places:
        program = _python_program(start)
        graphs = [ImportGraph(start, each, numbers) for each in find_modules(root, program and program.directory)]
        if program:
            places += _imported(graphs, program, numbers, set(places))
        followers = plug_in_followers(start, numbers, places)
        for graph in graphs:
            followers += import_followers(graph, set(places))
    return {START_ANNOTATION: encode_frames(places), FOLLOWERS_ANNOTATION: encode_followers(followers)}


def _at_hand(read_frame: Callable[[Blob, int], bytes]) -> Callable[[Blob, int], bytes]:
    """The same for hints, of which nothing depends: once a base cannot be read, KeyError for all of its frames."""
    away = False

    def read(blob: Blob, number: int) -> bytes:
        nonlocal away
        if away and blob.from_base:
            raise KeyError(number)
        try:
            return read_frame(blob, number)
        except (LoaderError, IntegrityError) as error:
            if not blob.from_base:
                raise
            away = True
            log.warning("what a start reads of the base is not looked for: %s", error)
            raise KeyError(number) from None

    return read


def _python_program(start: Start) -> PythonProgram | None:
    try:
        return python_program(start)
    except (OSError, KeyError):  # its bytes are not at hand
        return None


def _imported(
    graphs: Sequence[ImportGraph], program: PythonProgram, numbers: Mapping[Blob, int], known: set[Place]
) -> list[Place]:
    """The frames of a program and of all that it imports, but for those that are known."""
    found = {(numbers[blob], frame) for blob, frame in program.places if blob in numbers}
    for graph in graphs:
        modules = set(graph.resolved(program.imports))
        reached = graph.reached(modules)
        found |= graph.places(reduce(or_, (reached[module] for module in modules), 0))
    return sorted(found - known)
