"""How long work tells how far it is. The default says nothing; the commands draw bars on a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One step that has a length."""

    def advance(self, count: int) -> None:
        """`count` bytes (or items) more are done. Safe from any thread."""
        ...


class Progress(Protocol):
    """Gets told of the steps, one after the other; several threads may advance one."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Task]:
        """A step of `total` bytes (None: unknown), over when the context is left."""
        ...


class NoProgress:
    """Says nothing."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Task]:
        return nullcontext(self)

    def advance(self, count: int) -> None:
        pass
