"""The table of unanswered requests: what the kernel waits for, since when, and until when it may."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MOST_DEADLINES = 4


@dataclass(slots=True)
class Pending:
    """A request of the kernel. `token` is the kernel's name for it: an event's descriptor, or a msg_id.

    `opening` is set for an OPEN (then offset and length mean nothing). `thread` is who waits, where the kernel tells.
    `sent`: whoever was the worker when it came was asked at once.
    """

    id: int
    object: int
    offset: int
    length: int
    token: int
    opening: bool = False
    thread: int = 0
    sent: bool = False
    since: float = field(default_factory=time.monotonic)

    def describe(self) -> dict[str, Any]:
        return {
            "object": self.object,
            "what": "OPEN" if self.opening else "READ",
            "offset": self.offset,
            "length": self.length,
            "age": round(time.monotonic() - self.since, 3),
        }


class Present(NamedTuple):
    """A READ that was answered at once, for all of it was there."""

    object: int
    offset: int
    length: int


class Repeats(NamedTuple):
    """READs of what the worker knows to be read, answered at once: how many, and their bytes."""

    number: int
    length: int


class RequestTable:
    """Unanswered requests by number, oldest first. A number is never used twice by one keeper."""

    def __init__(self) -> None:
        self._next = 1
        self._served = float("-inf")  # when, time.monotonic()
        self._pending: dict[int, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Pending]:
        return iter(list(self._pending.values()))

    @property
    def following(self) -> int:
        """The number of the next request."""
        return self._next

    def add(
        self, object_id: int, offset: int, length: int, token: int, *, opening: bool = False, thread: int = 0,
        sent: bool = False,
    ) -> Pending:  # fmt: skip
        pending = Pending(self._next, object_id, offset, length, token, opening, thread, sent)
        self._pending[pending.id] = pending
        self._next += 1
        return pending

    def get(self, number: int) -> Pending | None:
        return self._pending.get(number)

    def take(self, number: int) -> Pending | None:
        """Remove and return: whoever takes a request is the one that answers it."""
        return self._pending.pop(number, None)

    def of(self, object_id: int) -> list[Pending]:
        """What waits for an object."""
        return [pending for pending in self._pending.values() if pending.object == object_id]

    def take_object(self, object_id: int) -> list[Pending]:
        return self._take(lambda pending: pending.object == object_id)

    def served(self) -> None:
        """One was answered with what it asked for: the others wait for their turn, and for nothing that is broken."""
        self._served = time.monotonic()

    def take_overdue(self, deadline: float) -> list[Pending]:
        """Remove and return those that waited for `deadline` seconds while none at all was served; or for
        MOST_DEADLINES times as long, whatever was."""
        now = time.monotonic()
        limit, last = now - deadline, now - MOST_DEADLINES * deadline
        return self._take(lambda pending: max(pending.since, self._served) < limit or pending.since < last)

    def take_all(self) -> list[Pending]:
        return self._take(lambda pending: True)

    def _take(self, wanted: Any) -> list[Pending]:
        taken = [pending for pending in self._pending.values() if wanted(pending)]
        for pending in taken:
            del self._pending[pending.id]
        return taken
