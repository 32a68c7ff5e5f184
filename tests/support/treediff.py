"""Compare two file trees in everything an image defines: python -m tests.support.treediff EXPECTED ACTUAL.

Compared: paths, type, permission bits, owner, size, mtime in nanoseconds, symlink target, device number, extended
attributes, which names are hard links of one another, link counts, and every byte (by sha256). Exit 1 and the first
differences on stdout if they differ.
"""

# Names in images are bytes, which pathlib does not take.
# ruff: noqa: PTH115, PTH118

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

_PIECE = 1 << 20
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(slots=True)
class Entry:
    """What is compared of one path. `links` is the first (in byte order) of the names of a hard-linked file."""

    kind: str
    mode: str
    owner: str
    mtime: int
    size: int | None = None
    rdev: tuple[int, int] | None = None
    target: bytes | None = None
    links: bytes | None = None
    nlink: int | None = None
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    content: str | None = None


def scan(root: Path, xattrs: bool = True, content: bool = True) -> dict[bytes, Entry]:
    """Read the tree under `root`, which is `b"."` in the result; without the other file systems mounted in it."""
    found: dict[bytes, Entry] = {}
    first_names: dict[int, bytes] = {}
    base = os.fsencode(root)
    regular: list[bytes] = []
    for path, status in sorted(_walk(base)):
        entry = _entry(os.path.join(base, path), status, xattrs)
        if not stat.S_ISDIR(status.st_mode):
            entry.links = first_names.setdefault(status.st_ino, path)
            entry.nlink = status.st_nlink
        found[path] = entry
        if stat.S_ISREG(status.st_mode) and entry.links == path:
            regular.append(path)
    if content:
        _read_contents(base, regular, found)
    return found


def _walk(base: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    root_status = os.lstat(base)
    yield b".", root_status
    pending = [b""]
    while pending:
        directory = pending.pop()
        with os.scandir(os.path.join(base, directory)) as entries:
            for entry in entries:
                path = os.path.join(directory, entry.name)
                status = entry.stat(follow_symlinks=False)
                yield path, status
                if stat.S_ISDIR(status.st_mode) and status.st_dev == root_status.st_dev:
                    pending.append(path)


def _entry(full: bytes, status: os.stat_result, xattrs: bool) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    entry = Entry(
        kind=_TYPES.get(kind, oct(kind)),
        mode=oct(stat.S_IMODE(status.st_mode)),
        owner=f"{status.st_uid}:{status.st_gid}",
        mtime=status.st_mtime_ns,
    )
    if kind == stat.S_IFREG:
        entry.size = status.st_size
    elif kind == stat.S_IFLNK:
        entry.target = os.readlink(full)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry.rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if xattrs:
        for name in os.listxattr(full, follow_symlinks=False):
            entry.xattrs[os.fsencode(name)] = os.getxattr(full, name, follow_symlinks=False)
    return entry


def _read_contents(base: bytes, paths: list[bytes], found: dict[bytes, Entry]) -> None:
    # Several readers at once: sha256 and read(2) drop the interpreter's lock, and a lazy mount is latency-bound.
    with ThreadPoolExecutor(4) as pool:
        for path, content in zip(paths, pool.map(lambda path: _digest(os.path.join(base, path)), paths), strict=True):
            found[path].content = content


def _digest(full: bytes) -> str:
    digest = hashlib.sha256()
    try:
        with open(full, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()


def compare(
    expected: dict[bytes, Entry],
    actual: dict[bytes, Entry],
    ignored_mtimes: Collection[bytes] = (),
    ignored_fields: Collection[str] = (),
) -> list[str]:
    """The differences of two scans, one line each; `ignored_mtimes` are paths whose mtime no tar entry defines."""
    lines = []
    for path in sorted(expected.keys() | actual.keys()):
        name = os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
        if path not in actual:
            lines.append(f"{name}: missing")
        elif path not in expected:
            lines.append(f"{name}: should not be there")
        else:
            ignored = {*ignored_fields, "mtime"} if path in ignored_mtimes else set(ignored_fields)
            lines += [f"{name}: {line}" for line in _compare_entries(expected[path], actual[path], ignored)]
    return lines


def _compare_entries(expected: Entry, actual: Entry, ignored: Collection[str]) -> Iterator[str]:
    for each in fields(Entry):
        before, after = getattr(expected, each.name), getattr(actual, each.name)
        if each.name in ignored or before == after:
            continue
        if each.name != "xattrs":
            yield f"{each.name} should be {_short(before)}, is {_short(after)}"
            continue
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                yield f"xattr {name.decode()} should be {_short(before.get(name))}, is {_short(after.get(name))}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}…"


def _keep_xattrs(tree: dict[bytes, Entry], prefixes: tuple[bytes, ...]) -> None:
    for entry in tree.values():
        entry.xattrs = {name: value for name, value in entry.xattrs.items() if name.startswith(prefixes)}


def main() -> int:
    parser = argparse.ArgumentParser(description="compare two file trees")
    parser.add_argument("expected", type=Path)
    parser.add_argument("actual", type=Path)
    parser.add_argument("--no-xattrs", action="store_true")
    parser.add_argument("--no-content", action="store_true")
    parser.add_argument("--ignore", action="append", default=[], help="a field that is not compared, e.g. nlink")
    parser.add_argument("--ignore-mtime", action="append", default=[], help="a path whose mtime is not compared")
    parser.add_argument("--ignore-root", action="store_true", help="do not compare the root directory itself")
    parser.add_argument("--only-xattrs", default="", help="prefixes of the xattrs to compare, with commas between them")
    parser.add_argument("--most", type=int, default=20, help="how many differences to print")
    options = parser.parse_args()
    expected, actual = (
        scan(root, xattrs=not options.no_xattrs, content=not options.no_content)
        for root in (options.expected, options.actual)
    )
    for tree in (expected, actual):
        if options.ignore_root:
            del tree[b"."]
        if options.only_xattrs:
            _keep_xattrs(tree, tuple(os.fsencode(options.only_xattrs).split(b",")))
    lines = compare(expected, actual, [os.fsencode(path) for path in options.ignore_mtime], options.ignore)
    for line in lines[: options.most]:
        print(line)
    print(f"{len(expected)} entries, {len(lines)} differences")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
