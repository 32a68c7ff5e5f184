"""Frames that are read once another one was, of any file: what a plug-in or a Python package brings with it.

As text, beside the list of a start, with runs of frames as there (frame_list.py):

    followers = entry *( SP entry )                        e.g. "1:107>1:108,1:129-130,0:224 1:304!1:303>1:359"
    entry     = frame [ "!" runs ] ">" runs                not where one of the frames behind "!" was read before
    runs      = run *( "," run )

Entries are hints, as the list is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from erofs_builder.errors import ArtifactError
from erofs_builder.frame_list import MAX_FRAMES, MAX_TEXT, Place, decode_frames, encode_frames


class Follower(NamedTuple):
    """`places` will be read once `head` is, unless one of `unless` was read before."""

    head: Place
    unless: tuple[Place, ...]
    places: list[Place]


def encode_followers(followers: Iterable[Follower]) -> str:
    """The text; what would make it too long is left out."""
    entries, length, count = [], 0, 0
    for head, unless, places in followers:
        guards = "!" + _runs(unless) if unless else ""
        entry = f"{encode_frames([head])}{guards}>{_runs(places)}"
        length, count = length + len(entry) + 1, count + len(unless) + len(places)
        if length > MAX_TEXT or count > MAX_FRAMES:
            break
        entries.append(entry)
    return " ".join(entries)


def _runs(places: Iterable[Place]) -> str:
    return encode_frames(places).replace(" ", ",")


def decode_followers(text: str) -> list[Follower]:
    """Read a text; ArtifactError if it is none."""
    if len(text) > MAX_TEXT:
        raise ArtifactError(f"followers: {len(text)} characters")
    found: list[Follower] = []
    count = 0
    for entry in text.split():
        condition, arrow, others = entry.partition(">")
        head, mark, guards = condition.partition("!")
        heads, unless, places = (decode_frames(runs.replace(",", " ")) for runs in (head, guards, others))
        count += len(unless) + len(places)
        if not arrow or len(heads) != 1 or bool(mark) != bool(unless) or not places or count > MAX_FRAMES:
            raise ArtifactError(f"followers: {entry[:40]!r} is no entry, or too long")
        found.append(Follower(heads[0], tuple(unless), places))
    return found
