"""Which modules a module of an image's tree brings with it, and in which frames they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_

from erofs_builder.frame_list import Place
from erofs_builder.model import Blob, Node
from erofs_builder.plug_ins import closure
from erofs_builder.python_imports import Import, imports_of
from erofs_builder.python_tree import Module, Modules
from erofs_builder.startup import Place as BlobPlace
from erofs_builder.startup import Start, encoded_size, frames_of, run_frames

MAX_READ = 4096  # sources; of more, those that are reached first
MAX_NEEDS = 100_000  # imports of all of them
_ROUNDS = 50  # in which what is needed by what is needed is found; imports are not as deep
MAX_SOURCE = 1 << 20  # bytes; a larger one is data
_WHOLE_PLUG_IN = 2 << 20  # encoded bytes of one that is taken whole: nearly all of it is used, as of a program
# In the interpreter itself (since 3.11), so that their files are not read.
_FROZEN = frozenset(
    b"""abc codecs io _collections_abc _sitebuiltins genericpath importlib._bootstrap importlib._bootstrap_external
    importlib.machinery importlib.util ntpath os posixpath runpy site stat zipimport""".split()
)


class ImportGraph:
    """The imports of one version's modules, as far as they were asked for. Modules go by number.

    `numbers` has the blobs whose frames count. A source that cannot be read brings nothing.
    """

    def __init__(self, start: Start, modules: Modules, numbers: Mapping[Blob, int]) -> None:
        self._start, self._blobs = start, numbers
        self._modules = list(modules.values())
        self._numbers = {name: number for number, name in enumerate(modules)}
        self._needs: dict[int, set[int]] = {}  # of those that were read
        self._count = 0  # of what all of these need
        self._places: dict[int, frozenset[Place]] = {}

    def __getitem__(self, number: int) -> Module:
        return self._modules[number]

    def __len__(self) -> int:
        return len(self._modules)

    def begins(self, number: int) -> Place | None:
        """The frame in which a module that has a source begins."""
        module = self._modules[number]
        if module.source is None or module.name in _FROZEN:
            return None
        return next(iter(self._counted(frames_of(module.file, 0, 1))), None)

    def package_of(self, number: int) -> int | None:
        """The package that a module is in."""
        return self._numbers.get(self._modules[number].name.rpartition(b".")[0])

    def resolved(self, imported: Iterable[Import], module: Module | None = None) -> Iterator[int]:
        """What imports name, in a module or else in a program."""
        for level, name, names in imported:
            if level:
                parts = module.name.split(b".") if module else []
                base = parts[: max(0, len(parts) - level + (module is not None and module.package))]
                name = b".".join([*base, name] if name else base)
            yield from self._nearest(name)
            for each in names:
                if (number := self._numbers.get(name + b"." + each)) is not None:
                    yield number

    def _nearest(self, name: bytes) -> Iterator[int]:
        """The module of a name, or else the package that is nearest to it; what that is in it brings itself."""
        while name:
            if (number := self._numbers.get(name)) is not None:
                yield number
                return
            name = name.rpartition(b".")[0]

    def reached(self, wanted: Iterable[int]) -> dict[int, int]:
        """All that modules bring, with themselves, as sets of bits: of those that are wanted, and of all that were."""
        self._read_all(wanted)
        reached = {number: 1 << number for number in self._needs}
        backwards = list(reversed(self._needs.items()))  # what was read last needs least
        for _ in range(_ROUNDS):
            before = dict(reached)
            for number, needs in backwards:
                reached[number] = reduce(or_, (reached[need] for need in needs), reached[number])
            if reached == before:
                break
        return reached

    def _read_all(self, wanted: Iterable[int]) -> None:
        """Read the sources of modules and of what they import, frame by frame, for each is decoded for it."""
        pending = set(wanted) - self._needs.keys()
        while pending:
            for number in sorted(pending, key=self._source_place):
                room = len(self._needs) < MAX_READ and self._count < MAX_NEEDS
                self._needs[number] = self._read(number) if room else set()
                self._count += len(self._needs[number])
            pending = {need for number in pending for need in self._needs[number]} - self._needs.keys()

    def _source_place(self, number: int) -> tuple[Place, int]:
        source = self._modules[number].source
        places = self._counted(frames_of(source, 0, 1)) if source is not None else []
        return next(iter(places), (0, 0)), number

    def _read(self, number: int) -> set[int]:
        """What a module needs: its package, and what it imports."""
        module = self._modules[number]
        needs = set(self._nearest(module.name.rpartition(b".")[0]))
        if module.source is not None:
            needs.update(self.resolved(imports_of(self._text(module.source)), module))
        return needs

    def _text(self, source: Node) -> bytes:
        if source.size > MAX_SOURCE:
            return b""
        try:
            return self._start.read(source, 0, source.size)
        except (OSError, KeyError):
            return b""

    def places(self, members: int) -> set[Place]:
        """What is read of modules, a set of bits, and of the libraries that plug-ins need."""
        return set[Place]().union(*map(self._places_of, _bits(members)))

    def _places_of(self, number: int) -> frozenset[Place]:
        if number not in self._places:
            module = self._modules[number]
            found: Iterable[BlobPlace] = ()
            if module.name not in _FROZEN:
                found = frames_of(module.file) if module.source is not None else self._plug_in(module)
            self._places[number] = frozenset(self._counted(found))
        return self._places[number]

    def _plug_in(self, module: Module) -> list[BlobPlace]:
        try:
            found = list(closure(self._start, module.path, module.file))
            program = self._start.program(module.file)
        except (OSError, KeyError):
            return []
        if program and encoded_size(frames_of(module.file)) <= _WHOLE_PLUG_IN:
            found += run_frames(module.file, program)
        return found

    def _counted(self, places: Iterable[BlobPlace]) -> list[Place]:
        return [(self._blobs[blob], frame) for blob, frame in places if blob in self._blobs]


def _bits(members: int) -> Iterator[int]:
    while members:
        lowest = members & -members
        yield lowest.bit_length() - 1
        members ^= lowest
