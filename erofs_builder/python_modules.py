"""The modules of Python's standard library that most programs import, whatever they do.

Byte code is packed in the order of its names, some ten modules in a frame, of which a program needs two or three. With
these in frames of their own, a start fetches them as a few frames that it needs whole. The list: what at least 4 of 36
libraries and tools import (click, requests, pytest, setuptools, asyncio, multiprocessing, …), without what is frozen
into the interpreter (3.11), and what HTTP clients import.
"""

from __future__ import annotations

import re

_TOP = """
    __future__ _compat_pickle _compression _weakrefset argparse ast base64 bisect bz2 calendar contextlib contextvars
    copy copyreg csv dataclasses datetime dis enum fnmatch functools gettext hashlib heapq hmac inspect ipaddress
    keyword linecache locale lzma mimetypes numbers opcode operator pathlib pickle platform pprint queue quopri random
    reprlib secrets selectors shlex shutil signal sitecustomize socket ssl string stringprep struct subprocess tempfile
    textwrap threading token tokenize traceback types typing uuid warnings weakref zipfile
"""
_PACKAGES = {
    "collections": "__init__ abc",
    "ctypes": "__init__ _endian",
    "email": """__init__ _encoded_words _parseaddr _policybase base64mime charset encoders errors feedparser header
        iterators message parser quoprimime utils""",
    "encodings": "__init__ aliases ascii idna latin_1 utf_8",
    "http": "__init__ client cookiejar cookies",
    "importlib": "__init__ _abc abc",
    "json": "__init__ decoder encoder scanner",
    "logging": "__init__",
    "re": "__init__ _casefix _compiler _constants _parser",
    "urllib": "__init__ error parse request response",
}
CORE = frozenset(
    name.encode()
    for name in [
        *_TOP.split(),
        *(f"{package}/{name}" for package, names in _PACKAGES.items() for name in names.split()),
    ]
)
_BYTE_CODE = re.compile(rb"(?:.*/)?lib/python3\.\d+/(?:([a-z]+)/)?__pycache__/(\w+)\.cpython-\d+\.pyc")


def is_core(path: bytes) -> bool:
    """Whether a path is the byte code of such a module, in a Python's own library."""
    match = _BYTE_CODE.fullmatch(path)
    return match is not None and (match[1] + b"/" + match[2] if match[1] else match[2]) in CORE


def library_of(interpreter: bytes) -> bytes | None:
    """Where the library of an interpreter, named by its path, is: usr/bin/python3.11 → usr/lib/python3.11."""
    match = re.fullmatch(rb"(.*/)?bin/(python3\.\d+)", interpreter)
    return (match[1] or b"") + b"lib/" + match[2] if match else None


def byte_code(library: bytes, version: bytes) -> list[bytes]:
    """The paths of all of these modules' byte code in a library; `version` as in its names, e.g. 311."""
    paths = []
    for name in sorted(CORE):
        package, _, module = name.rpartition(b"/")
        directory = library + b"/" + package if package else library
        paths.append(directory + b"/__pycache__/" + module + b".cpython-" + version + b".pyc")
    return paths
