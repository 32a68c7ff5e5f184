"""The Python program that an image's command runs: a script, a module (`-m`) or a text (`-c`), and what it imports.

A web server's image starts with `python app.py` or with a script of /usr/local/bin whose first line names a Python:
what that imports is read at each start.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from erofs_builder.import_graph import MAX_SOURCE
from erofs_builder.model import Node
from erofs_builder.python_imports import Import, imports_of
from erofs_builder.python_modules import library_of
from erofs_builder.startup import Place, Start, frames_of

_INTERPRETER = re.compile(rb"#![^\n]*\bpython[\d.]*\b")
_WITH_VALUE = ("-W", "-X")


class PythonProgram(NamedTuple):
    """`directory`: where its imports are looked for first; `places`: the frames of its own text."""

    directory: bytes
    imports: list[Import]
    places: list[Place]


def python_program(start: Start) -> PythonProgram | None:
    """The program of a start's command; None if it is no Python's. OSError, KeyError: its bytes are not at hand."""
    for arguments in start.commands():
        found = start.find_program(arguments[0])
        if found is None:
            continue
        if _INTERPRETER.match(start.read(found[1], 0, 256)):
            return _script(start, *found)
        if library_of(found[0]):
            return _of_interpreter(start, arguments[1:])
    return None


def _of_interpreter(start: Start, words: list[bytes]) -> PythonProgram | None:
    directory = start.command.directory.encode(errors="surrogateescape")
    pending = iter(words)
    for word in pending:
        if word.decode(errors="replace") in _WITH_VALUE:
            next(pending, None)
        elif word == b"-m":
            module = next(pending, b"")
            return PythonProgram(directory, [Import(0, module, ()), Import(0, module + b".__main__", ())], [])
        elif word == b"-c":
            return PythonProgram(directory, list(imports_of(next(pending, b""))), [])
        elif not word.startswith(b"-"):
            found = start.file(word if word.startswith(b"/") else directory + b"/" + word)
            return _script(start, *found) if found else None
    return None


def _script(start: Start, path: bytes, node: Node) -> PythonProgram:
    text = start.read(node, 0, node.size) if node.size <= MAX_SOURCE else b""
    return PythonProgram(path.rpartition(b"/")[0], list(imports_of(text)), frames_of(node))
