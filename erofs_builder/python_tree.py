"""The Python modules in an image's tree, by their names: where an `import` would find them.

Libraries of one version (`…/lib/python3.11`, its `lib-dynload`, and what is in `site-packages` and `dist-packages`, of
the system, below /usr/local or of a virtual environment) are taken together, as one interpreter mostly sees them.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from erofs_builder.model import Node
from erofs_builder.paths import lookup

MAX_MODULES = 20_000  # of a version; of more, those that are found first
MAX_DEPTH = 12  # directories below a library
_LIBRARY = re.compile(rb"python3\.(\d{1,2})")
_SHARED = b"python3"  # Debian's, for all versions
_PACKAGES = (b"site-packages", b"dist-packages")
_CACHE = b"__pycache__"
# Not imported by what is run, and much.
_PASSED_OVER = frozenset((_CACHE, b"lib-dynload", b"test", b"tests", b"idlelib", b"lib2to3", *_PACKAGES))


class Module(NamedTuple):
    """A module of a tree. `file` is what is read to import it: byte code, the source without one, or a plug-in."""

    name: bytes
    path: bytes  # of the file
    file: Node
    source: Node | None  # None: a plug-in
    package: bool


Modules = dict[bytes, Module]  # by full name


def find_modules(root: Node, program: bytes | None = None) -> list[Modules]:
    """The modules of each version of Python that has a library in the tree; with those in a program's directory."""
    libraries: dict[bytes, list[tuple[bytes, Node]]] = {}
    shared: list[tuple[bytes, Node]] = []
    for path, node in _library_directories(root):
        name = path.rpartition(b"/")[2]
        if match := _LIBRARY.fullmatch(name):
            libraries.setdefault(match[1], []).append((path, node))
        else:
            shared.append((path, node))
    own = lookup(root, program) if program is not None else None
    return [_modules_of(version, found, shared, own) for version, found in sorted(libraries.items())]


def _library_directories(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Directories `lib/python3.…`, in the order of their paths."""
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        below = [(name, child) for name, child in (node.children or {}).items() if child.children is not None]
        for name, child in sorted(below, reverse=True, key=_name):
            if path.rpartition(b"/")[2] in (b"lib", b"lib64") and (name == _SHARED or _LIBRARY.fullmatch(name)):
                yield path + b"/" + name, child
            elif path.count(b"/") < MAX_DEPTH and name not in _PACKAGES:
                stack.append((path + b"/" + name if path else name, child))


def _name(item: tuple[bytes, Node]) -> bytes:
    return item[0]


def _modules_of(
    version: bytes,
    libraries: list[tuple[bytes, Node]],
    shared: list[tuple[bytes, Node]],
    own: tuple[bytes, Node] | None,
) -> Modules:
    modules: Modules = {}
    tag = b"cpython-3" + version
    if own is not None:
        _add_directory(modules, *own, tag, plain=True)
    for path, node in _search_path(libraries, shared):
        _add_directory(modules, path, node, tag)
    return modules


def _search_path(libraries: list[tuple[bytes, Node]], shared: list[tuple[bytes, Node]]) -> Iterator[tuple[bytes, Node]]:
    """The standard library before what was installed, as `sys.path` has it."""
    below = [(b"lib-dynload",), _PACKAGES]
    yield from libraries
    for names in below:
        for path, node in [*libraries, *(shared if names is _PACKAGES else ())]:
            for name in names:
                child = (node.children or {}).get(name)
                if child is not None and child.children is not None:
                    yield path + b"/" + name, child


def _add_directory(modules: Modules, top: bytes, directory: Node, tag: bytes, plain: bool = False) -> None:
    """Add all modules below a directory; if that is any one, only packages that have an `__init__.py`."""
    stack = [(top, directory, b"")]
    while stack:
        path, node, prefix = stack.pop()
        children = node.children or {}
        cache = children.get(_CACHE)
        compiled = (cache.children if cache is not None else None) or {}
        for name, child in children.items():
            if child.children is not None:
                passed_over = name in _PASSED_OVER or (plain and b"__init__.py" not in child.children)
                if not passed_over and prefix.count(b".") < MAX_DEPTH:
                    stack.append((path + b"/" + name, child, prefix + name + b"."))
            elif len(modules) < MAX_MODULES and stat.S_ISREG(child.mode):
                _add_file(modules, path, name, child, prefix, compiled, tag)


def _add_file(
    modules: Modules, path: bytes, name: bytes, node: Node, prefix: bytes, compiled: dict[bytes, Node], tag: bytes
) -> None:
    stem, _, suffix = name.partition(b".")
    if suffix == b"py":
        package = stem == b"__init__"
        full = prefix[:-1] if package else prefix + stem
        byte_code = stem + b"." + tag + b".pyc"
        if byte_code in compiled:
            file, where = compiled[byte_code], path + b"/" + _CACHE + b"/" + byte_code
        else:
            file, where = node, path + b"/" + name
        if full:
            modules.setdefault(full, Module(full, where, file, node, package))
    elif suffix in (b"so", b"abi3.so") or (suffix.startswith(tag + b"-") and suffix.endswith(b".so")):
        modules.setdefault(prefix + stem, Module(prefix + stem, path + b"/" + name, node, None, False))
