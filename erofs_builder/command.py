"""The command of an image, with which its start begins (startup.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_SHELLS = ("sh", "bash", "dash", "ash")
_MOST = 4  # programs, each run by the one before
_MAX_TEXT = 4096  # characters of a shell's text that is looked at
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


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

    def programs(self) -> Iterator[tuple[str, ...]]:
        """The arguments of the command, and of what may be run by way of it: `tini -- node app.js` or an image's own
        `entrypoint.sh node app.js`, `sh -c "exec gunicorn app:app"`. Whether a word is a program, the tree knows."""
        arguments = self.arguments
        for _ in range(_MOST):
            if not arguments:
                return
            yield arguments
            arguments = _run_by(arguments)


def _run_by(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of what a program may run, empty for none."""
    name, rest = arguments[0].rpartition("/")[2], list(arguments[1:])
    if name in _SHELLS:
        is_text = len(rest) > 1 and re.fullmatch(r"-[a-z]*c", rest[0])
        return _last_command(rest[1]) if is_text else ()
    while rest and (rest[0].startswith("-") or _ASSIGNMENT.match(rest[0])):
        del rest[0]
    return tuple(rest)


def _last_command(text: str) -> tuple[str, ...]:
    """The words of the last command in a shell's text, for mostly that is what stays."""
    try:
        words = list(shlex.shlex(text[:_MAX_TEXT], posix=True, punctuation_chars=True))
    except ValueError:  # a quote without its end
        return ()
    for at in reversed(range(len(words))):
        if words[at] in ("&&", "||", ";", "|", "&"):
            del words[: at + 1]
            break
    while words and (words[0] == "exec" or _ASSIGNMENT.match(words[0])):
        del words[0]
    return tuple(words)
