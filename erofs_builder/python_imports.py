"""What a Python source imports as it is imported itself, found without running or parsing it.

Statements at the beginning of a line, and those in the first level of its `try`, `if`, `else` and `with`. What is in
functions and classes, behind `except`, `if TYPE_CHECKING` and `if __name__ == …` is not looked at, for mostly it is not
run. A hint: a line of a string that looks like an import counts as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# An import at the beginning of a line or on the first level below one, or what says whether such a level is run.
_LINE = re.compile(
    rb"\n(?=[acdefitw\t]|    [fi])"  # by itself, no line could begin otherwise: most are passed over faster with it
    rb"(?:(from|import)(?=[ \t])|(try|else|finally|with|if|elif)\b|(?:def|class|async|except|for|while)\b"
    rb"|(?:    |\t)(?=((?:from|import)[ \t])))"
)
_FROM = re.compile(rb"from[ \t]+(\.{0,50})[ \t]*([\w.]{0,200})[ \t]+import[ \t]*(\(|(?:[^\n\\#;]|\\\r?\n)*)")
_IMPORT = re.compile(rb"import[ \t]+((?:[^\n\\#;]|\\\r?\n)*)")
_NOT_RUN = re.compile(rb"\bTYPE_CHECKING\b|\b__name__\b")
_COMMENT = re.compile(rb"#[^\n]*")
MAX_NAME = 200  # bytes
_NAME = re.compile(rb"[\w.]{1,%d}" % MAX_NAME)


class Import(NamedTuple):
    """`from ..module import names` has the level 2; `import module` the level 0 and no names."""

    level: int
    module: bytes
    names: tuple[bytes, ...]


def imports_of(source: bytes) -> Iterator[Import]:
    """The imports of a source, in its order. Takes time by its length, whatever it is."""
    text, runs = b"\n" + source, False  # whether what is indented here is run
    passed = 0
    for match in _LINE.finditer(text):
        plain, block, indented = match.groups()
        if match.start() < passed:
            continue
        if not plain and not indented:
            runs = block is not None and not _NOT_RUN.search(text, match.end(), _end(text, b"\n", match.end()))
        elif plain or runs:
            imports, passed = _import_at(text, match.start(1) if plain else match.end())
            yield from imports


def _end(text: bytes, mark: bytes, begin: int) -> int:
    end = text.find(mark, begin)
    return end if end >= 0 else len(text)


def _import_at(text: bytes, begin: int) -> tuple[list[Import], int]:
    """The imports of a statement, and its end."""
    if match := _FROM.match(text, begin):
        end = _end(text, b")", match.end()) if match[3] == b"(" else match.end()
        return [Import(len(match[1]), match[2], tuple(_names(text[match.start(3) : end])))], end
    if match := _IMPORT.match(text, begin):
        return [Import(0, name, ()) for name in _names(match[1])], match.end()
    return [], begin


def _names(text: bytes) -> list[bytes]:
    """Names that are separated by commas, each without its `as`."""
    found = (_NAME.search(part) for part in _COMMENT.sub(b"", text).split(b","))
    return [match[0] for match in found if match]
