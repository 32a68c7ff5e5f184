"""Kinds of files: how each is cut into frames. Part of the encoder's version, for it decides a blob's bytes.

Files of one kind are read in one way: a program maps a few pages of a shared library, but reads a module or a text
whole; headers, tests, compilers and documentation are not read at start-up at all. Keeping kinds in frames of their own
keeps what is not needed out of what is fetched; the sizes trade bytes fetched against the compression ratio
(bench/frames.py measures both).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from erofs_builder.python_modules import is_core

_KIB = 1024


class Kind(NamedTuple):
    """How files of one kind are cut. Sizes are decoded bytes, multiples of 4 KiB."""

    name: str
    piece: int  # a larger file is cut into pieces of this size, each its own frame
    bin: int  # smaller files are packed into frames of about this size
    prose: bool = False  # repeats itself in longer matches than machine code does


ELF = Kind("elf", 192 * _KIB, 192 * _KIB)
BYTECODE = Kind("bytecode", 144 * _KIB, 144 * _KIB)
CORE = Kind("core", 144 * _KIB, 256 * _KIB)  # byte code that most programs read
SCRIPT = Kind("script", 384 * _KIB, 384 * _KIB, prose=True)
DEVELOPMENT = Kind("development", 640 * _KIB, 960 * _KIB)
DOCUMENT = Kind("document", 640 * _KIB, 960 * _KIB, prose=True)
PACKED = Kind("packed", 640 * _KIB, 960 * _KIB)
# A query reads a page here and a page there, and a frame is fetched and decoded whole for each.
DATABASE = Kind("database", 64 * _KIB, 64 * _KIB)
OTHER = Kind("other", 256 * _KIB, 256 * _KIB)
# More data than is ever fetched at once: indexes, models, disk images. Programs read here and there in them; and what
# takes up to 64 KiB of the blob the kernel asks for once, what takes more twice.
LARGE = Kind("large", 128 * _KIB, 128 * _KIB)
_LARGE_SIZE = 4096 * _KIB
KINDS = (ELF, BYTECODE, CORE, SCRIPT, DEVELOPMENT, DOCUMENT, PACKED, DATABASE, OTHER, LARGE)

_BY_SUFFIX = {
    suffix.encode(): kind
    for kind, suffixes in (
        (BYTECODE, "pyc pyo class elc luac beam"),
        (SCRIPT, "py pl pm sh rb js mjs ts lua tcl php el r m json xml yaml yml toml ini conf cfg"),
        (DEVELOPMENT, "a o h hh hpp hxx c cc cpp inc f90 pyx pxd pyi la cmake gir vapi"),
        (DOCUMENT, "txt md rst html htm tex svg po pot mo man info list md5sums css map"),
        (PACKED, "gz xz bz2 zst lz4 zip whl egg jar png jpg jpeg gif webp woff woff2 mp3 ogg mp4 deb rpm tgz br 7z"),
        (DATABASE, "db sqlite sqlite3 db3 mdb mmdb sst ldb gdbm ibd myd myi dbf"),
    )
    for suffix in suffixes.split()
}
_DOCUMENT_DIRECTORIES = re.compile(rb"/share/(?:doc|man|locale|info|i18n)/|/dpkg/info/")
# A compiler's own programs and libraries; and tests, which packages put beside what they test.
_DEVELOPMENT_DIRECTORIES = re.compile(rb"/lib(?:exec)?/gcc/|/tests?/")
_SQLITE_MAGIC = b"SQLite f"
_PACKED_MAGICS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04", b"\x89PNG")


def classify(path: bytes, head: bytes, size: int) -> Kind:
    """The kind of a file, from its path in the layer, its first bytes (8 are enough), and its size in bytes."""
    if head.startswith(_PACKED_MAGICS):
        return PACKED
    if head.startswith(_SQLITE_MAGIC):
        return DATABASE
    parent, _, name = path.rpartition(b"/")
    by_directory = _kind_of_directory(parent)
    if by_directory is DEVELOPMENT or path.endswith(b".o"):
        return DEVELOPMENT
    if head.startswith(b"\x7fELF"):
        return ELF
    kind = _BY_SUFFIX.get(name[name.rfind(b".") + 1 :].lower())
    if kind is BYTECODE and is_core(path):
        return CORE
    return kind or by_directory or (SCRIPT if head.startswith(b"#!") else LARGE if size >= _LARGE_SIZE else OTHER)


@lru_cache(256)
def _kind_of_directory(path: bytes) -> Kind | None:
    """What the directory says of the files in it. Archives come directory by directory, so most answers are known."""
    rooted = b"/%b/" % path
    if _DEVELOPMENT_DIRECTORIES.search(rooted):
        return DEVELOPMENT
    return DOCUMENT if _DOCUMENT_DIRECTORIES.search(rooted) else None
