"""What a Python program imports, as the builder knows it: against what a real Python has loaded once it has run it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from erofs_builder.command import Command
from erofs_builder.followers import Follower
from erofs_builder.frame_list import decode_frames
from erofs_builder.import_followers import import_followers
from erofs_builder.import_graph import ImportGraph
from erofs_builder.layer import build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.paths import lookup
from erofs_builder.python_imports import MAX_NAME, Import, imports_of
from erofs_builder.python_program import python_program
from erofs_builder.python_tree import find_modules
from erofs_builder.startup import Start
from erofs_builder.tree import flatten
from loader.convert.start import start_list
from loader.errors import TransientRegistryError
from tests.support.oci import tar_of

LIBRARY = "usr/lib/python3.11"
PACKAGES = f"{LIBRARY}/site-packages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"", []),
        (b"import os", [(0, b"os", ())]),
        (b"import os, a.b.c as d , e # f, g\nx = 1", [(0, b"os", ()), (0, b"a.b.c", ()), (0, b"e", ())]),
        (b"from a.b import c as d, e", [(0, b"a.b", (b"c", b"e"))]),
        (b"from . import c; import d", [(1, b"", (b"c",))]),
        (b"from ..a import *", [(2, b"a", ())]),
        (b"from a import (b, # c, d\n    e as f,\n)\nimport g", [(0, b"a", (b"b", b"e")), (0, b"g", ())]),
        (b"from a import b, \\\n    c\nimport \\\n d", [(0, b"a", (b"b", b"c")), (0, b"d", ())]),
        (b"import a\r\nfrom b import c\r\n", [(0, b"a", ()), (0, b"b", (b"c",))]),
        (b"try:\n    import a\nexcept ImportError:\n    import b\nelse:\n    import c", [(0, b"a", ()), (0, b"c", ())]),
        (b"try:\n\timport a\nfinally:\n\timport b", [(0, b"a", ()), (0, b"b", ())]),
        (b"if x:\n    import a\nelif y:\n    from b import c", [(0, b"a", ()), (0, b"b", (b"c",))]),
        (b"if TYPE_CHECKING:\n    import a\nelse:\n    import b", [(0, b"b", ())]),
        (b"if typing.TYPE_CHECKING:\n    import a", []),
        (b'if __name__ == "__main__":\n    import a', []),
        (b"def f():\n    import a\nclass C:\n    import b\nasync def g():\n    import c", []),
        (b"with x:\n    import a\nfor x in y:\n    import b\nwhile x:\n    import c", [(0, b"a", ())]),
        (b"try:\n    def f():\n        import a", []),
        (b"important = 1\nfrom_ = 2\nimport\nfrom x\nfrom x import\n", [(0, b"x", ())]),
        (b"from a import (b", [(0, b"a", (b"b",))]),
        (b"import \xff\xfe\x00, a", [(0, b"a", ())]),
    ],
)
def test_imports_of_a_source(source: bytes, expected: list[tuple[int, bytes, tuple[bytes, ...]]]) -> None:
    assert list(imports_of(source)) == [Import(*each) for each in expected]


@pytest.mark.parametrize(
    "line",
    [
        b"from a import (b,",
        b"import a,\\",
        b"from a import b,\\",
        b"import " + b"a." * 500,
        b"from " + b"." * 60 + b" import x",
        b"try:",
        b"if x",
        b"    import a",
        b"from\t\t\t\t",
        b"\t",
    ],
)
def test_no_source_takes_long(line: bytes) -> None:
    source = (line + b"\n") * ((1 << 20) // (len(line) + 1))
    started = time.process_time()
    found = list(imports_of(source))
    assert time.process_time() - started < 10  # quadratic: minutes
    assert all(len(name) <= MAX_NAME for each in found for name in (each.module, *each.names))


class Image:
    """Files as a layer, with the frames that each is in."""

    def __init__(self, files: dict[str, bytes], **command: tuple[str, ...] | str) -> None:
        out = io.BytesIO()
        layer = build_layer(io.BytesIO(tar_of(files)), out)
        self.data, self.blob = out.getvalue(), layer.blob
        assert self.blob is not None
        self.frames = {
            path.decode(): [extent.frame for extent in node.extents] for path, node, _ in layer.entries if node
        }
        self.root = flatten([layer])
        for name in files:
            if "/bin/" in name:
                self.file(name).mode |= 0o111
        self.command = Command(**command)  # type: ignore[arg-type]
        self.start = Start(self.root, self.command, self.read_frame)

    def read_frame(self, blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame = blob.table[number]
        encoded = self.data[frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        return zstandard.ZstdDecompressor().decompress(encoded)

    def file(self, path: str) -> Node:
        found = lookup(self.root, path.encode())
        assert found is not None, path
        return found[1]

    @property
    def graph(self) -> ImportGraph:
        (modules,) = find_modules(self.root)
        assert self.blob is not None
        return ImportGraph(self.start, modules, {self.blob: 0})

    def followers(self, known: frozenset[tuple[int, int]] = frozenset()) -> list[Follower]:
        return import_followers(self.graph, known)

    def head(self, path: str) -> tuple[int, int]:
        return 0, self.frames[path][0]


def _names(image: Image, program: bytes | None = None) -> dict[str, str]:
    """Names of modules and the paths of their files, of one version."""
    (modules,) = find_modules(image.root, program)
    return {name.decode(): module.path.decode() for name, module in modules.items()}


def test_modules_are_found_where_a_python_looks_for_them() -> None:
    image = Image(
        {
            f"{LIBRARY}/json/__init__.py": b"#",
            f"{LIBRARY}/json/__pycache__/__init__.cpython-311.pyc": b"c",
            f"{LIBRARY}/json/__pycache__/__init__.cpython-310.pyc": b"old",
            f"{LIBRARY}/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so": b"plug-in",
            f"{LIBRARY}/lib-dynload/_old.cpython-31-x86_64-linux-gnu.so": b"plug-in",
            f"{LIBRARY}/test/test_json.py": b"#",
            "usr/lib/python3/dist-packages/six.py": b"#",
            "usr/lib/python3/dist-packages/json/__init__.py": b"# behind the library's",
            "usr/local/lib/python3.11/dist-packages/name/space/deep.py": b"#",
            "usr/local/lib/python3.11/dist-packages/fast.abi3.so": b"plug-in",
            "opt/venv/lib/python3.11/site-packages/inside/__init__.py": b"#",
            "opt/venv/lib/python3.11/site-packages/inside-1.0.dist-info/METADATA": b"#",
            "srv/python3.11/never.py": b"#",
            "app/__init__.py": b"#",
            "app/main.py": b"#",
            "app/own/__init__.py": b"#",
            "app/own/part.py": b"#",
            "app/data/script.py": b"# no package",
        }
    )
    expected = {
        "json": f"{LIBRARY}/json/__pycache__/__init__.cpython-311.pyc",
        "_ssl": f"{LIBRARY}/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so",
        "six": "usr/lib/python3/dist-packages/six.py",
        "name.space.deep": "usr/local/lib/python3.11/dist-packages/name/space/deep.py",
        "fast": "usr/local/lib/python3.11/dist-packages/fast.abi3.so",
        "inside": "opt/venv/lib/python3.11/site-packages/inside/__init__.py",
    }
    assert _names(image) == expected
    own = {"main": "app/main.py", "own": "app/own/__init__.py", "own.part": "app/own/part.py"}
    assert _names(image, b"app") == expected | own
    assert find_modules(Image({"usr/lib/python4/a.py": b"#", "lib/x": b"#"}).root) == []


def test_each_version_has_its_own_modules() -> None:
    image = Image({f"usr/lib/python3.{version}/a{version}.py": b"#" for version in (9, 12)})
    assert [list(modules) for modules in find_modules(image.root)] == [[b"a12"], [b"a9"]]


def _filler(name: str) -> bytes:
    """Byte code that fills more than half of a frame, so that no two of them share one."""
    return name.encode() + os.urandom(100_000)


def _package(where: str, sources: dict[str, bytes], pack: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Modules with their byte code, each in a frame of its own but for those to be packed."""
    files = {}
    for name, source in sources.items():
        directory, _, module = f"{where}/{name}".rpartition("/")
        files[f"{directory}/{module}.py"] = source
        files[f"{directory}/__pycache__/{module}.cpython-311.pyc"] = b"small" if name in pack else _filler(name)
    return files


def _code(path: str) -> str:
    directory, _, name = f"{PACKAGES}/{path}".rpartition("/")
    return f"{directory}/__pycache__/{name}.cpython-311.pyc"


def test_a_package_is_followed_by_all_that_it_imports() -> None:
    sources = {
        "one/__init__": b"from . import a\nimport two.deep\n",
        "one/a": b"from .b import thing\n",
        "one/b": b"from one import a  # a circle\ndef f():\n    import one.late\n",
        "one/late": b"",
        "two/__init__": b"",
        "two/deep": b"",
        "two/other": b"",
    }
    image = Image(_package(PACKAGES, sources) | {f"{LIBRARY}/os.py": b""})
    found = {head: (unless, set(places)) for head, unless, places in image.followers()}
    needed = {image.head(_code(name)) for name in ("one/a", "one/b", "two/__init__", "two/deep")}
    assert found == {image.head(_code("one/__init__")): ((), needed)}
    known = frozenset(needed - {image.head(_code("two/deep"))})
    assert image.followers(known) == [Follower(image.head(_code("one/__init__")), (), [image.head(_code("two/deep"))])]


def test_a_frame_that_packages_share_tells_only_what_all_of_them_need() -> None:
    sources = {
        "one/__init__": b"import common, first\n",
        "two/__init__": b"import common, second\n",
        "common": b"",
        "first": b"",
        "second": b"",
    }
    image = Image(_package(PACKAGES, sources, frozenset(("one/__init__", "two/__init__"))))
    shared = image.head(_code("one/__init__"))
    assert shared == image.head(_code("two/__init__"))
    assert image.followers() == [Follower(shared, (), [image.head(_code("common"))])]


def test_the_rest_of_another_package_is_not_who_is_read_first() -> None:
    sources = {
        "alpha/__init__": b"",
        "alpha/rest": b"",
        "beta/__init__": b"import common\n",
        "beta/own": b"import first\n",
        "common": b"",
        "first": b"",
    }
    image = Image(_package(PACKAGES, sources, frozenset(("alpha/rest", "beta/__init__"))))
    shared = image.head(_code("beta/__init__"))
    assert shared == image.head(_code("alpha/rest"))
    begins = image.head(_code("alpha/__init__"))
    assert image.followers() == [Follower(shared, (begins,), [image.head(_code("common"))])]


def test_a_part_is_followed_by_what_its_package_has_not_brought() -> None:
    sources = {
        "one/__init__": b"import common\n",
        "one/part/__init__": b"from ..util import x\nimport common\n",
        "one/util": b"",
        "common": b"",
    }
    image = Image(_package(PACKAGES, sources))
    found = {head: places for head, _, places in image.followers()}
    assert found == {
        image.head(_code("one/__init__")): [image.head(_code("common"))],
        image.head(_code("one/part/__init__")): [image.head(_code("one/util"))],
    }


def test_bytes_that_are_not_at_hand_bring_nothing() -> None:
    image = Image(_package(PACKAGES, {"one/__init__": b"import two", "two": b""}))

    def refuse(blob: Blob, number: int) -> bytes:
        raise KeyError(number)

    image.start.read_frame = refuse
    assert image.followers() == []


def test_a_base_that_is_away_is_asked_once_and_costs_no_conversion(caplog: pytest.LogCaptureFixture) -> None:
    files = _package(PACKAGES, {"one/__init__": b"import two", "two": b""})
    image = Image(files | {"usr/bin/app": b"#!/usr/bin/python3\n"}, arguments=("app",))
    assert image.blob is not None
    image.blob.from_base = True
    asked = []

    def fail(blob: Blob, number: int) -> bytes:
        asked.append(number)
        raise TransientRegistryError("registry.example: timed out")

    texts = start_list(image.root, [image.blob], image.command, fail)
    assert set(texts.values()) == {""} and len(asked) == 1
    assert "registry.example: timed out" in caplog.text
    image.blob.from_base = False
    with pytest.raises(TransientRegistryError):
        start_list(image.root, [image.blob], image.command, fail)


def _program(*arguments: str, directory: str = "/app") -> tuple[list[bytes], set[str]] | None:
    """What the program of a command imports, and the files that the start's list has because of that."""
    files = _package(PACKAGES, {"server/__init__": b"import flask", "flask": b"", "server/__main__": b"import run"})
    files |= _package("app", {"main": b"import own", "own": b"import flask", "never": b""})
    files |= _package(PACKAGES, {"run": b""})
    files |= {
        "usr/bin/python3.11": Path("/usr/bin/true").read_bytes(),
        "usr/local/bin/serve": b"#!/usr/bin/env python3.11\nfrom server import main\n",
        "usr/bin/true": b"#!/bin/sh\n",
    }
    image = Image(files, arguments=arguments, environment=("PATH=/usr/local/bin:/usr/bin",), directory=directory)
    program = python_program(image.start)
    assert image.blob is not None
    texts = start_list(image.root, [image.blob], image.command, image.read_frame)
    listed = {frame for _, frame in decode_frames(texts["org.erofs-ondemand.start"])}
    if program is None:
        return None
    names = {path for path, frames in image.frames.items() if path.endswith(".pyc") and listed.intersection(frames)}
    return [each.module for each in program.imports], {name.rpartition("/")[2].partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("arguments", "imports", "listed"),
    [
        (("python3.11", "main.py"), [b"own"], {"own", "flask"}),
        (("/usr/bin/python3.11", "-u", "-W", "ignore", "/app/main.py", "-m"), [b"own"], {"own", "flask"}),
        (("python3.11", "-m", "server"), [b"server", b"server.__main__"], {"__init__", "flask", "__main__", "run"}),
        (("python3.11", "-c", "import flask"), [b"flask"], {"flask"}),
        (("serve", "--port", "80"), [b"server"], {"__init__", "flask"}),
        (("true", "--", "python3.11", "main.py"), [b"own"], {"own", "flask"}),
        (("true", "serve"), [b"server"], {"__init__", "flask"}),
        (("python3.11", "-m"), [b"", b".__main__"], set()),
        (("python3.11", "gone.py"), None, None),
        (("python3.11",), None, None),
        (("true",), None, None),
        (("gone",), None, None),
        ((), None, None),
    ],
)
def test_the_program_of_a_command(
    arguments: tuple[str, ...], imports: list[bytes] | None, listed: set[str] | None
) -> None:
    found = _program(*arguments)
    assert found == (None if imports is None else (imports, listed))


# What a program of the standard library imports; each is started by a real Python.
_PROGRAMS = ("asyncio", "concurrent.futures", "email.mime.text", "http.server", "json", "logging.config", "sqlite3",
             "unittest.mock", "urllib.request", "xml.dom.minidom", "zipfile", "multiprocessing.pool")  # fmt: skip


def _run(program: str) -> set[str]:
    """The names that a real Python prints as JSON."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def _loaded(module: str) -> set[str]:
    """The modules from files that a Python has loaded once it has imported one."""
    files = "[name for name, module in sys.modules.items() if getattr(module, '__file__', None)]"
    return _run(f"import sys; import {module}; names = {files}; import json; print(json.dumps(names))")


def _library() -> Iterator[tuple[str, bytes]]:
    top = Path(sysconfig.get_path("stdlib"))
    for path in top.rglob("*"):
        parts = path.relative_to(top).parts
        if not {"test", "tests", "site-packages", "dist-packages", "idlelib"}.intersection(parts) and path.suffix in (
            ".py",
            ".so",
        ):
            yield f"usr/lib/{top.name}/{'/'.join(parts)}", path.read_bytes()


def test_a_real_python_loads_what_was_said() -> None:
    graph = Image(dict(_library())).graph
    numbers = {graph[number].name.decode(): number for number in range(len(graph))}
    begun = _run("import sys, json; print(json.dumps(sorted(sys.modules)))")  # before any program
    said, loaded = set[tuple[str, str]](), set[tuple[str, str]]()
    for program in _PROGRAMS:
        bits = graph.reached([numbers[program]])[numbers[program]]
        said |= {(program, name) for name, number in numbers.items() if bits >> number & 1 and name not in begun}
        loaded |= {(program, name) for name in _loaded(program) - begun}
    assert len(loaded) > 300
    assert len(said & loaded) >= 0.95 * len(loaded), sorted(loaded - said)
    assert len(said & loaded) >= 0.85 * len(said), sorted(said - loaded)
