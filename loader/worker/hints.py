"""The hints of an image's payload (erofs_builder/hints.py), or those that its tree gives."""

from __future__ import annotations

from erofs_builder.erofs.reader import Reader
from erofs_builder.hints import NO_HINTS, Hints, find_hints
from erofs_builder.hints_codec import decode_hints
from erofs_builder.payload import Payload

MAX_INODES = 200_000  # above this, walking the tree costs more than the hints save


def hints_of(payload: Payload) -> list[Hints]:
    """Hints about each blob of an image; none for a very large one that was built when payloads had none.

    ArtifactError, ErofsError: the payload is malformed.
    """
    if payload.hints:
        return decode_hints(payload.hints, payload.tables)
    reader = Reader(payload.erofs, payload.tables, payload.form)
    if reader.superblock.inos > MAX_INODES:
        return [NO_HINTS] * len(payload.tables)
    return find_hints(reader.read_tree(), payload.tables)
