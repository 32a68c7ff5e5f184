"""Which pages of which files a start touched: the document from which a layout is rebuilt (startup_layout.py).

    erofs-ondemand trace 1
    0-2 /usr/bin/python3.11
    7 /etc/ld.so.cache

UTF-8 text. After the first line, each line is a run of pages of 4 KiB of one file, in the order of their first use:
number of the first and, unless it is the same, of the last one, a space, and the file's path in the image, in which all
but the unreserved characters of RFC 3986 and `/` are written as %XX. A trace is a hint: pages and files that are not
there are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from erofs_builder.errors import ArtifactError
from erofs_builder.frame_list import Place
from erofs_builder.frames import BLOCK
from erofs_builder.model import Blob, Node
from erofs_builder.paths import lookup

HEADER = "erofs-ondemand trace 1"
MAX_DOCUMENT = 64 << 20  # bytes
MAX_PAGE = 1 << 48
_LINE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))? (/[A-Za-z0-9_.~/%-]{0,12285})")


class PageRun(NamedTuple):
    """Adjacent pages of a file, `last` included; `path` without a slash in front."""

    path: bytes
    first: int
    last: int


def encode_page_trace(runs: Iterable[PageRun]) -> bytes:
    """The document of a trace."""
    lines = [HEADER]
    for path, first, last in runs:
        lines.append(
            f"{first}-{last} /{quote_from_bytes(path)}" if last > first else f"{first} /{quote_from_bytes(path)}"
        )
    return "\n".join(lines).encode() + b"\n"


def decode_page_trace(data: bytes) -> list[PageRun]:
    """Read a document; ArtifactError says what is wrong with it."""
    if len(data) > MAX_DOCUMENT:
        raise ArtifactError(f"trace: {len(data)} bytes are more than a trace has")
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"trace: byte {error.start} is not ASCII") from None
    if not lines or lines[0] != HEADER:
        raise ArtifactError(f"trace: does not begin with {HEADER!r}")
    runs = []
    for number, line in enumerate(lines[1:], 2):
        match = _LINE.fullmatch(line)
        if match is None or not int(match[1]) <= int(match[2] or match[1]) < MAX_PAGE:
            raise ArtifactError(f"trace: line {number}, {line[:60]!r}, is no run of pages")
        runs.append(PageRun(unquote_to_bytes(match[3][1:]), int(match[1]), int(match[2] or match[1])))
    return runs


def gathered(touched: Iterable[PageRun]) -> list[PageRun]:
    """The same pages, each in the run of its first use only; runs of a file that follow each other become one."""
    seen: dict[bytes, set[int]] = {}
    found: list[PageRun] = []
    for path, first, last in touched:
        known = seen.setdefault(path, set())
        for page in range(first, last + 1):
            if page in known:
                continue
            known.add(page)
            if found and found[-1].path == path and found[-1].last == page - 1:
                found[-1] = found[-1]._replace(last=page)
            else:
                found.append(PageRun(path, page, page))
    return found


def traced_nodes(root: Node, runs: Iterable[PageRun]) -> Iterator[tuple[Node, range]]:
    """The files of a tree that a trace names, with the pages of each run that they have."""
    for path, first, last in runs:
        found = lookup(root, path)
        if found is None or found[1].children is not None:
            continue
        pages = range(first, min(last + 1, -(-found[1].size // BLOCK)))
        if pages:
            yield found[1], pages


def traced_frames(root: Node, runs: Iterable[PageRun], blobs: Mapping[Blob, int]) -> list[Place]:
    """The frames that hold a trace's pages, in the order of their first use. `blobs`: the number of each blob."""
    places: dict[Place, None] = {}
    for node, pages in traced_nodes(root, runs):
        at = 0
        for extent in node.extents:
            if extent.blob is not None and at < pages.stop * BLOCK and at + extent.length > pages.start * BLOCK:
                places[blobs[extent.blob], extent.frame] = None
            at += extent.length
    return list(places)
