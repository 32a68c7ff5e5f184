"""Which mounts there are: /proc/thread-self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo. `options` are the mount's, `super_options` the file system's."""

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """The mounts in mountinfo's text, in its order; ValueError on a line that is none."""
    for line in text.splitlines():
        front, separator, back = line.partition(" - ")
        fields, rest = front.split(" "), back.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            raise ValueError(f"not a line of mountinfo: {line!r}")
        major, _, minor = fields[2].partition(":")
        yield Mount(
            int(fields[0]),
            int(fields[1]),
            (int(major), int(minor)),
            _unescape(fields[3]),
            _unescape(fields[4]),
            fields[5],
            rest[0],
            _unescape(rest[1]),
            rest[2],
        )


def mountinfo(fstype: str | None = None) -> list[Mount]:
    """The mounts of this thread's namespace, or those of one file system type. Does not touch any of them."""
    text = Path("/proc/thread-self/mountinfo").read_bytes().decode(errors="surrogateescape")
    return [mount for mount in parse_mountinfo(text) if fstype in (None, mount.fstype)]


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
