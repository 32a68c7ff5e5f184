"""What follows the first read of a Python package: what its modules import, and these, and so on.

A program that imports numpy reads 80 frames for it, each once the import before it has run: one wait after another on a
far registry. But which they are is written in the sources. So with the first frame of a package all of them are
fetched, in a few ranges.

Who reads a frame may want any of the modules in it: what each of these would bring follows, and nothing else. As the
module of a package is imported after the package itself, that is mostly what the package brings. And where the rest of
a frame are modules of packages that begin in other frames, which nobody has read yet, it is none of these. What has
followed the frame in which their package begins does not follow a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from operator import and_, or_

from erofs_builder.followers import Follower
from erofs_builder.frame_list import Place
from erofs_builder.import_graph import ImportGraph

MAX_HEADS = 1024  # frames with packages in them
MAX_GUARDS = 16  # frames of which none may have been read


def import_followers(graph: ImportGraph, known: Collection[Place]) -> list[Follower]:
    """Followers of the frames in which packages begin. `known`: the frames of the start, which are fetched anyway."""
    heads = _heads(graph)
    reached = graph.reached({module for modules in heads.values() for module in modules})
    certain = {head: reduce(and_, map(reached.__getitem__, modules)) for head, modules in heads.items()}
    found = []
    for head, modules in heads.items():
        before = {module: _before(graph, module) - {head} for module in modules}
        brought = reduce(and_, (_all(certain, places) for places in before.values()))
        entries = [(set[Place](), certain[head] & ~brought)]
        guards = set[Place]().union(*before.values())
        own = [module for module in modules if not before[module]]
        if own and 0 < len(guards) <= MAX_GUARDS:
            entries.append((guards, reduce(and_, map(reached.__getitem__, own)) & ~certain[head]))
        for unless, members in entries if head not in known else ():
            if left := graph.places(members).difference(known, {head}):
                found.append(Follower(head, tuple(sorted(unless)), sorted(left)))
    return found


def _all(certain: Mapping[Place, int], heads: Iterable[Place]) -> int:
    """What follows any of these frames."""
    return reduce(or_, (certain.get(head, 0) for head in heads), 0)


def _heads(graph: ImportGraph) -> Mapping[Place, list[int]]:
    """Frames in which packages begin, each with all modules that begin there."""
    begin: dict[Place, list[int]] = {}
    packages: dict[Place, None] = {}
    for number in range(len(graph)):
        if (place := graph.begins(number)) is not None:
            begin.setdefault(place, []).append(number)
            if graph[number].package and len(packages) < MAX_HEADS:
                packages[place] = None
    return {place: begin[place] for place in packages}


def _before(graph: ImportGraph, number: int) -> set[Place]:
    """The frames in which the packages begin that a module is in: read before it is."""
    found = set[Place]()
    package = graph.package_of(number)
    while package is not None:
        if (place := graph.begins(package)) is not None:
            found.add(place)
        package = graph.package_of(package)
    return found
