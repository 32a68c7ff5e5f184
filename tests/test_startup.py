"""What a start reads, as the builder knows it: against what ldd finds in a tree of this machine's own programs."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
import zstandard

from erofs_builder.command import Command
from erofs_builder.elf import read_program
from erofs_builder.errors import ArtifactError
from erofs_builder.followers import Follower, decode_followers, encode_followers
from erofs_builder.frame_list import MAX_FRAMES, MAX_TEXT, decode_frames, encode_frames
from erofs_builder.layer import build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.paths import lookup
from erofs_builder.plug_ins import plug_in_followers
from erofs_builder.python_modules import byte_code, is_core, library_of
from erofs_builder.startup import Start
from erofs_builder.tree import flatten
from tests.support.oci import tar_of


def _ldd(program: str) -> list[str]:
    """Every file that the loader maps for a program, the loader among them."""
    lines = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.splitlines()
    return [word for line in lines for word in line.split() if word.startswith("/")]


class Tree:
    """A tree of host files (with the symbolic links that lead to them) and others, built into a blob."""

    def __init__(self, tmp_path: Path, paths: list[str], others: dict[str, bytes]) -> None:
        wanted = {Path(each): None for each in ("/lib", "/lib64", "/bin") if Path(each).is_symlink()}
        for text in paths:
            path = Path(text)
            while path not in wanted:  # the path itself, and where it leads if it is a link
                path = path.parent.resolve() / path.name
                wanted[path] = None
                path = path.parent / path.readlink() if path.is_symlink() else path
        names = [str(path)[1:] for path in wanted]
        tar = subprocess.run(["tar", "-C", "/", "-cf", "-", *names], capture_output=True, check=True)
        layers = []
        self.blobs: dict[Blob, bytes] = {}
        for data in (tar.stdout, tar_of(others)):
            out = io.BytesIO()
            layers.append(build_layer(io.BytesIO(data), out))
            if blob := layers[-1].blob:
                self.blobs[blob] = out.getvalue()
        self.root = flatten(layers)

    def read_frame(self, blob: Blob, number: int) -> bytes:
        assert blob.table is not None
        frame = blob.table[number]
        encoded = self.blobs[blob][frame.encoded_offset : frame.encoded_offset + frame.encoded_size]
        return zstandard.ZstdDecompressor().decompress(encoded)

    def file(self, path: str) -> Node:
        found = lookup(self.root, path.encode())
        assert found is not None, path
        return found[1]

    def heads(self, *paths: str) -> set[tuple[Blob, int]]:
        extents = [self.file(path).extents[0] for path in paths]
        return {(extent.blob, extent.frame) for extent in extents if extent.blob is not None}

    def start(self, *arguments: str, environment: tuple[str, ...] = ()) -> set[tuple[Blob, int]]:
        return set(Start(self.root, Command(arguments, environment), self.read_frame).frames())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    others = {
        "app/run": b"#!/usr/bin/env python3\nprint()\n",
        "app/loop": b"#!/app/loop\n",
        "app/gone": b"#!/no/such/thing\n",
        "app/data": os.urandom(300_000),
    }
    configuration = ["/etc/ld.so.conf", "/etc/ld.so.cache", *map(str, Path("/etc/ld.so.conf.d").iterdir())]
    programs = ["/usr/bin/python3", "/usr/bin/env", "/usr/bin/tar"]
    libraries = [path for program in programs for path in _ldd(program)]
    return Tree(tmp_path_factory.mktemp("tree"), [*configuration, *programs, *libraries], others)


@pytest.mark.parametrize("name", ["python3", "tar"])
def test_a_program_needs_what_ldd_says(tree: Tree, name: str) -> None:
    wanted = tree.heads(f"/usr/bin/{name}", "/etc/ld.so.cache", *_ldd(f"/usr/bin/{name}"))
    assert wanted <= tree.start(name)
    assert not tree.heads("/app/data") & tree.start(name)


def test_a_script_needs_its_interpreters(tree: Tree) -> None:
    wanted = tree.heads("/app/run", "/usr/bin/env", "/usr/bin/python3", *_ldd("/usr/bin/python3"))
    assert wanted <= tree.start("/app/run")
    assert wanted <= tree.start("run", environment=("PATH=/nowhere:/app:/usr/bin",))


@pytest.mark.parametrize("name", ["/app/loop", "/app/gone", "/app/none", "none", "", "/app/data", "/app"])
def test_a_command_that_leads_nowhere(tree: Tree, name: str) -> None:
    assert len(tree.start(name)) <= 1


def test_blobs_that_are_not_at_hand(tree: Tree) -> None:
    def refuse(blob: Blob, number: int) -> bytes:
        raise KeyError(number)

    assert Start(tree.root, Command(("python3",)), refuse).frames() == []


def test_malformed_programs_are_no_programs() -> None:
    data = Path("/usr/bin/env").read_bytes()
    for size in (0, 3, 16, 63):
        cut = data[:size]
        assert read_program(lambda offset, length, cut=cut: cut[offset : offset + length]) is None  # type: ignore[misc]
    for at in range(1024):
        broken = bytearray(data)
        broken[at] ^= 0xFF
        read_program(lambda offset, length, broken=broken: bytes(broken[offset : offset + length]))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["/usr/bin/python3", "/usr/bin/g++", "/lib/x86_64-linux-gnu/libstdc++.so.6"])
def test_what_exceptions_read_is_known(name: str) -> None:
    data = Path(name).read_bytes()
    program = read_program(lambda offset, length: data[offset : offset + length])
    assert program is not None
    listed = subprocess.run(["readelf", "-SW", name], capture_output=True, text=True, check=True).stdout
    rows = [line.partition("]")[2].split() for line in listed.splitlines()]
    places = {row[0]: (int(row[3], 16), int(row[4], 16)) for row in rows if row and row[0].startswith(".")}
    begin, end = program.unwinding
    for section in (".eh_frame_hdr", ".eh_frame"):
        offset, size = places[section]
        assert begin <= offset and offset + size <= end
    for section in (".text", ".rodata", ".data", ".dynamic"):
        offset, size = places[section]
        assert offset + size <= begin or offset >= end


def test_frame_lists() -> None:
    places = [(1, 5), (1, 6), (1, 7), (0, 141), (1, 30), (1, 29)]
    assert encode_frames(places) == "1:5-7 0:141 1:30 1:29"
    assert decode_frames(encode_frames(places)) == places
    assert decode_frames("") == []
    assert len(encode_frames((0, 2 * number) for number in range(100_000))) <= MAX_TEXT
    assert len(decode_frames(encode_frames((0, number) for number in range(MAX_FRAMES)))) == MAX_FRAMES


@pytest.mark.parametrize(
    "text", ["1", "1:", ":1", "1:2-", "1:3-2", "-1:2", "a:1", "1:1,2", "0:0-99999999", "1:²", "0:1 " * 20_000]
)
def test_malformed_frame_lists(text: str) -> None:
    with pytest.raises(ArtifactError):
        decode_frames(text)


@pytest.mark.parametrize(
    ("arguments", "programs"),
    [
        ((), []),
        (("nginx", "-g", "daemon off;"), ["nginx", "daemon off;"]),
        (("/tini", "-v", "--", "node", "app.js"), ["/tini", "node", "app.js"]),
        (("env", "-u", "A=1", "B=2", "python3", "-u", "x"), ["env", "python3", "x"]),
        (("/bin/sh", "-c", "cd /app && A=b exec gunicorn 'a b' --c"), ["/bin/sh", "gunicorn", "a b"]),
        (("bash", "-ec", "a; b | sh -c 'exec c d'"), ["bash", "sh", "c", "d"]),
        (("sh", "-c", "it's"), ["sh"]),
        (("sh", "-c", ""), ["sh"]),
        (("sh", "-c", "a &&"), ["sh"]),
        (("sh", "run.sh"), ["sh"]),
        (("a", "b", "c", "d", "e"), ["a", "b", "c", "d"]),
    ],
)
def test_what_a_command_runs(arguments: tuple[str, ...], programs: list[str]) -> None:
    assert [each[0] for each in Command(arguments).programs()] == programs


def test_an_entrypoint_leads_to_the_program_behind_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path, ["/usr/bin/env", "/usr/bin/true"], {"entrypoint.sh": b'#!/bin/nothing\nexec "$@"\n'})
    direct = tree.start("/usr/bin/true")
    assert direct and direct <= tree.start("/entrypoint.sh", "true", "--flag")
    assert direct <= tree.start("/usr/bin/env", "-u", "A=1", "true")
    assert not direct & tree.start("/entrypoint.sh", "false")


def _library(directory: Path, name: str, *needed: str) -> bytes:
    """A shared object of several frames, as the linker makes it, that needs others of its directory."""
    (directory / "data").write_bytes(os.urandom(600_000))
    source = f'.section .rodata\n.incbin "{directory}/data"\n.data\n.quad 1\n'
    options = [f"-l:{each}" for each in needed]
    command = ["gcc", "-shared", "-nostdlib", "-x", "assembler", "-", "-x", "none", "-o", str(directory / name)]
    link = ["-Wl,--no-as-needed", f"-L{directory}", *options, "-Wl,-rpath,$ORIGIN/../lib"]
    subprocess.run([*command, *link], input=source.encode(), check=True)
    return (directory / name).read_bytes()


def test_a_plug_in_is_followed_by_its_libraries(tmp_path: Path) -> None:
    deep = _library(tmp_path, "libdeep.so")
    near = _library(tmp_path, "libnear.so", "libdeep.so")
    others = {
        "app/lib/libdeep.so": deep,
        "app/lib/libnear.so": near,
        "app/lib/libother.so": _library(tmp_path, "libother.so"),
        "app/plug/in.so": _library(tmp_path, "in.so", "libnear.so"),
        "app/plug/cut.so": near[:5000] + os.urandom(300_000),
        "app/plug/text.so": b"no program\n",
    }
    tree = Tree(tmp_path, ["/usr/bin/env"], others)
    numbers = {blob: number for number, blob in enumerate(tree.blobs)}
    start = Start(tree.root, Command(), tree.read_frame)
    followers = plug_in_followers(start, numbers, [])
    found = {head: places for head, _, places in followers}

    def head(path: str) -> tuple[int, int]:
        ((blob, frame),) = tree.heads(path)
        return numbers[blob], frame

    assert {head("/app/lib/libnear.so"), head("/app/lib/libdeep.so")} <= set(found[head("/app/plug/in.so")])
    assert head("/app/lib/libother.so") not in found[head("/app/plug/in.so")]
    assert head("/app/plug/in.so") not in found[head("/app/plug/in.so")]
    assert decode_followers(encode_followers(followers)) == followers
    listed = {place: others for place, _, others in plug_in_followers(start, numbers, [head("/app/lib/libnear.so")])}
    assert head("/app/lib/libnear.so") not in listed[head("/app/plug/in.so")]


def test_followers_as_text() -> None:
    followers = [
        Follower((0, 5), (), [(1, 6), (1, 7), (0, 2)]),
        Follower((1, 0), ((0, 3), (0, 4), (1, 9)), [(0, 0)]),
        Follower((1, 0), (), [(0, 1)]),
    ]
    assert encode_followers(followers) == "0:5>1:6-7,0:2 1:0!0:3-4,1:9>0:0 1:0>0:1"
    assert decode_followers(encode_followers(followers)) == followers
    assert decode_followers("") == []
    many = [Follower((0, number), (), [(0, number + 1)]) for number in range(20_000)]
    assert len(encode_followers(many)) <= MAX_TEXT
    kept = decode_followers(encode_followers(many))
    assert kept == many[: len(kept)] and len(kept) > 1000
    wide = [Follower((0, number), (), [(1, frame) for frame in range(9000)]) for number in range(20)]
    assert decode_followers(encode_followers(wide)) == wide[:7]  # of 65,536 frames


@pytest.mark.parametrize(
    "text",
    [
        "0:1",
        ">0:1",
        "0:1-2>0:3",
        "0:1 0:2>0:3",
        "0:1>x",
        "0:1>0:0-65535 0:2>0:0-9",
        "0:1>0:2 " * 9000,
        "0:1!>0:2",
        "0:1!x>0:2",
        "!0:1>0:2",
        "0:1!0:2",
        "0:1!0:2!0:3>0:4",
        "0:1>",
        "0:1!0:2>",
    ],
)
def test_malformed_followers(text: str) -> None:
    with pytest.raises(ArtifactError):
        decode_followers(text)


def test_a_python_reads_its_core_modules() -> None:
    library = "usr/local/lib/python3.12"
    files = {
        "usr/local/bin/python3.12": b"#!/nothing\n",
        f"{library}/__pycache__/enum.cpython-312.pyc": os.urandom(40_000),
        f"{library}/__pycache__/turtle.cpython-312.pyc": os.urandom(40_000),
        f"{library}/json/__pycache__/decoder.cpython-312.pyc": os.urandom(40_000),
        f"{library}/site-packages/__pycache__/enum.cpython-312.pyc": os.urandom(40_000),
    }
    out = io.BytesIO()
    layer = build_layer(io.BytesIO(tar_of(files)), out)
    places = {path: extent.frame for path, node, _ in layer.entries if node for extent in node.extents}
    names = [name.encode() for name in files]
    assert places[names[1]] == places[names[3]] != places[names[2]] == places[names[4]]
    assert is_core(names[1]) and is_core(names[3]) and not is_core(names[2]) and not is_core(names[4])
    assert library_of(names[0]) == library.encode() and library_of(b"bin/python3.9") == b"lib/python3.9"
    assert library_of(b"usr/bin/perl") is None
    assert {names[1], names[3]} <= set(byte_code(library.encode(), b"312"))
    assert all(is_core(path) for path in byte_code(b"usr/lib/python3.11", b"311"))
