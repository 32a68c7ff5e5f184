"""What `scrub` finds, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Checked(NamedTuple):
    """Something that was looked at: its bytes, whether it was damaged, and under what a report counts it."""

    size: int
    damaged: bool
    unit: str = "frames"


Checks = Iterator[Checked]
