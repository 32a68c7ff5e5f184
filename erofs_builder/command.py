"""The command of an image, with which its start begins (startup.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """What an image's config says about its start."""

    arguments: tuple[str, ...] = ()  # entrypoint and command
    environment: tuple[str, ...] = ()
    directory: str = "/"

    def variable(self, name: str) -> bytes:
        """The value of a variable of the environment, empty without one."""
        prefix = name + "="
        found = [text[len(prefix) :] for text in self.environment if text.startswith(prefix)]
        return found[-1].encode(errors="surrogateescape") if found else b""
