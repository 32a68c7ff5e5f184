"""A list of frames as text: what a start reads, in the order of its use, beside an image's metadata.

    list  = run *( SP run )          e.g. "1:5-7 0:141 1:30"
    run   = blob ":" first [ "-" last ]

Decimal numbers: `blob` counts the artifact's data blobs from 0, `first` and `last` are frames of it. A list is a hint:
what is not there is passed over, and nothing is read because of it that is not verified like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from erofs_builder.errors import ArtifactError

MAX_TEXT = 1 << 16
MAX_FRAMES = 1 << 16
_RUN = re.compile(r"([0-9]{1,5}):([0-9]{1,9})(?:-([0-9]{1,9}))?")

Place = tuple[int, int]  # blob, frame


def encode_frames(places: Iterable[Place]) -> str:
    """The text of a list. Frames that follow each other are one run; what would make it too long is left out."""
    runs: list[list[int]] = []
    for blob, frame in places:
        if runs and runs[-1][0] == blob and runs[-1][2] + 1 == frame:
            runs[-1][2] = frame
        else:
            runs.append([blob, frame, frame])
    parts, length, frames = [], 0, 0
    for blob, first, last in runs:
        part = f"{blob}:{first}" + (f"-{last}" if last > first else "")
        length, frames = length + len(part) + 1, frames + last - first + 1
        if length > MAX_TEXT or frames > MAX_FRAMES:
            break
        parts.append(part)
    return " ".join(parts)


def decode_frames(text: str) -> list[Place]:
    """The frames of a list, in order; ArtifactError if it is none."""
    if len(text) > MAX_TEXT:
        raise ArtifactError(f"frame list: {len(text)} characters")
    places: list[Place] = []
    for part in text.split():
        match = _RUN.fullmatch(part)
        if match is None:
            raise ArtifactError(f"frame list: {part[:40]!r} is no run of frames")
        blob, first, last = int(match[1]), int(match[2]), int(match[3] or match[2])
        if last < first or len(places) + last - first >= MAX_FRAMES:
            raise ArtifactError(f"frame list: {part[:40]!r} is backwards or too long")
        places += [(blob, frame) for frame in range(first, last + 1)]
    return places
