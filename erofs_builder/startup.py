"""What an image's start reads first, as far as the image itself says: its program, interpreters and their libraries.

The command of the image's config is found along its PATH, and so is what that runs in its turn (behind an init or an
entrypoint script, in a shell's text); a script leads to the program in its first line; an ELF program to its loader
and, as that would, to all libraries that it needs; a Python also to the modules that most programs import. The result
is a list of frames in about the order of their use, a hint for whoever fetches: nothing depends on its being right.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from erofs_builder.command import Command
from erofs_builder.elf import Program, read_program
from erofs_builder.model import Blob, Node
from erofs_builder.paths import lookup
from erofs_builder.python_modules import byte_code, library_of

Place = tuple[Blob, int]  # a frame
ReadFrame = Callable[[Blob, int], bytes]  # its decoded bytes; may raise OSError or KeyError where it is not at hand

DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LIBRARY_DIRECTORIES = (b"/lib", b"/usr/lib", b"/lib64", b"/usr/lib64", b"/usr/local/lib")
_CACHE, _CONFIGURATION = b"/etc/ld.so.cache", b"/etc/ld.so.conf"
MAX_FILES = 512
MAX_SCRIPTS = 4  # interpreters that are scripts themselves
# Encoded bytes of a file that is taken whole: nearly all of a program is used, of a large library little.
_WHOLE_PROGRAM, _WHOLE_LIBRARY = 4 << 20, 1 << 20


@dataclass(slots=True)
class Start:
    """Walks from an image's command to its programs and libraries."""

    root: Node
    command: Command
    read_frame: ReadFrame
    first: dict[Place, None] = field(default_factory=dict)
    rest: dict[Place, None] = field(default_factory=dict)
    modules: dict[Place, None] = field(default_factory=dict)
    cache: dict[Place, bytes] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    directories: list[bytes] | None = None  # that ldconfig searches
    programs: dict[int, Program | None] = field(default_factory=dict)  # by the node's id: libraries recur
    libraries: dict[bytes, tuple[bytes, Node] | None] = field(default_factory=dict)  # found where all are looked for

    def frames(self) -> list[Place]:
        """The frames that a start reads, each once; empty if the command leads nowhere."""
        try:
            for name, *_ in self.commands():
                self._program(name, MAX_SCRIPTS)
        except (OSError, KeyError):  # its bytes are not at hand: what was found so far is as good
            pass
        return list(self.first | self.rest | self.modules)

    def commands(self) -> Iterator[list[bytes]]:
        """The arguments of the command and of what is run by way of it, as far as these are programs of the tree."""
        for number, arguments in enumerate(self.command.programs()):
            words = [argument.encode(errors="surrogateescape") for argument in arguments]
            found = self.find_program(words[0])
            if found and (not number or found[1].mode & 0o111):
                yield words

    def _program(self, name: bytes, scripts: int) -> None:
        found = self.find_program(name)
        if found is None or id(found[1]) in self.seen:
            return
        path, node = found
        head = self.read(node, 0, 256)
        if head.startswith(b"#!") and scripts:
            self._add(self.first, frames_of(node))
            words = head[2:].partition(b"\n")[0].split()
            for word in words[: 2 if words and words[0].endswith(b"/env") else 1]:
                self._program(word, scripts - 1)
            return
        self._loaded(path, node, _WHOLE_PROGRAM)
        if library := library_of(path):
            version = library.rpartition(b"python")[2].replace(b".", b"")
            for module in byte_code(library, version):
                if file := self.file(module):
                    self._add(self.modules, frames_of(file[1]))

    def find_program(self, name: bytes) -> tuple[bytes, Node] | None:
        """The file that is run under a name, and its path."""
        if b"/" in name:
            return self.file(name if name.startswith(b"/") else self.command.directory.encode() + b"/" + name)
        directories = (self.command.variable("PATH") or DEFAULT_PATH).split(b":")
        return self._first_file(directories, name)

    def file(self, path: bytes) -> tuple[bytes, Node] | None:
        """The regular file at a path, and its path without links."""
        found = lookup(self.root, path)
        return found if found and stat.S_ISREG(found[1].mode) else None

    def _first_file(self, directories: Iterable[bytes], name: bytes) -> tuple[bytes, Node] | None:
        return next((found for each in directories if (found := self.file(each + b"/" + name))), None)

    def _loaded(self, path: bytes, node: Node, whole: int) -> None:
        """An ELF file and, breadth first as the loader goes, all that it needs."""
        pending = [(path, node, whole)]
        inherited: list[bytes] = []
        while pending and len(self.seen) < MAX_FILES:
            path, node, whole = pending.pop(0)
            if id(node) in self.seen:
                continue
            self.seen.add(id(node))
            program = self.program(node)
            if program is None:
                continue
            for offset, length in program.touched:
                self._add(self.first, frames_of(node, offset, length))
            if encoded_size(frames_of(node)) <= whole:
                self._add(self.rest, run_frames(node, program))
            if program.interpreter and (loader := self.file(program.interpreter)):
                pending.append((*loader, _WHOLE_LIBRARY))
                if cache := self.file(_CACHE):
                    self._add(self.first, frames_of(cache[1]))
            inherited += self.search(path, program)
            for name in program.needed:
                if library := self.library(name, inherited):
                    pending.append((*library, _WHOLE_LIBRARY))

    def program(self, node: Node) -> Program | None:
        """What a file's headers say, read once."""
        if id(node) not in self.programs:
            self.programs[id(node)] = read_program(partial(self.read, node))
        return self.programs[id(node)]

    def search(self, path: bytes, program: Program) -> list[bytes]:
        """A program's RPATH and RUNPATH."""
        origin = b"/" + path.rpartition(b"/")[0]
        return [each.replace(b"$ORIGIN", origin).replace(b"${ORIGIN}", origin) for each in program.search]

    def library(self, name: bytes, inherited: Sequence[bytes]) -> tuple[bytes, Node] | None:
        """The file that the loader takes for a DT_NEEDED name, and its path; `inherited`: RPATH and RUNPATH."""
        if b"/" in name:
            return self.file(name)
        if inherited:
            return self._searched(name, inherited)
        if name not in self.libraries:
            self.libraries[name] = self._searched(name)
        return self.libraries[name]

    def _searched(self, name: bytes, inherited: Sequence[bytes] = ()) -> tuple[bytes, Node] | None:
        given = [each for each in self.command.variable("LD_LIBRARY_PATH").split(b":") if each]
        if self.directories is None:
            self.directories = self._configured()
        return self._first_file([*inherited, *given, *self.directories, *LIBRARY_DIRECTORIES], name)

    def _configured(self) -> list[bytes]:
        """The directories that ldconfig searches."""
        found: list[bytes] = []
        texts = [_CONFIGURATION]
        if directory := lookup(self.root, _CONFIGURATION + b".d"):
            texts += [_CONFIGURATION + b".d/" + name for name in sorted(directory[1].children or {})]
        for path in texts:
            if (file := self.file(path)) and file[1].size < 65536:
                lines = self.read(file[1], 0, file[1].size).split(b"\n")
                found += [line.strip() for line in lines if line.strip().startswith(b"/")]
        return found

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """At most `length` bytes of a file at `offset`."""
        parts, at, end = [], 0, min(offset + length, node.size)
        for extent in node.extents:
            low, high = max(offset, at), min(end, at + extent.length)
            if low < high:
                if extent.blob is None:
                    parts.append(bytes(high - low))
                else:
                    data = self._frame(extent.blob, extent.frame)
                    parts.append(data[extent.frame_offset + low - at : extent.frame_offset + high - at])
            at += extent.length
        return b"".join(parts)

    def _frame(self, blob: Blob, frame: int) -> bytes:
        data = self.cache.get((blob, frame))
        if data is None:
            data = self.cache[blob, frame] = self.read_frame(blob, frame)
            while len(self.cache) > 64:
                del self.cache[next(iter(self.cache))]
        return data

    @staticmethod
    def _add(chosen: dict[Place, None], places: Iterable[Place]) -> None:
        chosen.update(dict.fromkeys(places))


def frames_of(node: Node, offset: int = 0, length: int | None = None) -> list[Place]:
    """The frames that hold a range of a file."""
    end = node.size if length is None else offset + length
    places, at = [], 0
    for extent in node.extents:
        if extent.blob is not None and at < end and at + extent.length > offset:
            places.append((extent.blob, extent.frame))
        at += extent.length
    return places


def run_frames(node: Node, program: Program) -> list[Place]:
    """The frames of a program, but for what only exceptions read."""
    begin, end = program.unwinding
    return frames_of(node, 0, begin) + frames_of(node, end, node.size - end)


def encoded_size(places: Iterable[Place]) -> int:
    """Bytes of frames on the wire."""
    return sum(blob.table[frame].encoded_size for blob, frame in places if blob.table)
