"""Across layers: content that several blobs hold is read from the lowest of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from erofs_builder.contents import Contents
from erofs_builder.layer import Layer
from erofs_builder.model import Blob, Extent, Node, replace_extents

_Where = tuple[Blob | None, int, int]  # blob, frame, offset in it


class Deduplicator:
    """Finds the pieces of upper blobs that a lower blob holds, and points nodes at the lower copy."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._moves: dict[_Where, Extent] = {}
        first: dict[bytes, Extent] = {}
        blobs = {layer.blob: layer.contents for layer in layers if layer.blob is not None}
        repeated = _repeated(blobs.values())
        for blob, contents in blobs.items() if repeated else ():
            self._compare(blob, contents, repeated, first)

    def _compare(self, blob: Blob, contents: Contents, repeated: set[bytes], first: dict[bytes, Extent]) -> None:
        for digest, frame, offset, length in contents:
            if digest not in repeated:
                continue
            lower = first.get(digest)
            if lower is None or (lower.frame_offset and not offset):
                # A piece that starts its frame serves cut files too: keep the first of those instead.
                if lower is not None:
                    self._moves.setdefault((blob, frame, offset), lower)
                first[digest] = Extent(blob, frame, offset, length)
            elif lower.blob is not blob:
                self._moves[blob, frame, offset] = lower

    def apply(self, root: Node) -> None:
        """Replace the nodes below `root` whose extents move; hard links stay one node."""
        if self._moves:
            replace_extents(root, self._moved)

    def _moved(self, node: Node) -> tuple[Extent, ...]:
        extents = node.extents
        if len(extents) > 1:
            return tuple(self._move(extent, True) for extent in extents)
        extent = extents[0]
        return (self._move(extent, False),) if extent[:3] in self._moves else extents

    def _move(self, extent: Extent, several: bool) -> Extent:
        if extent.blob is None:
            return extent
        lower = self._moves.get(extent[:3])
        if lower is None or lower.length != extent.length or (several and lower.frame_offset):
            return extent
        return lower


def _repeated(several: Iterable[Contents]) -> set[bytes]:
    """The digests of content that is there more than once: of most images a small part."""
    seen: set[bytes] = set()
    repeated: set[bytes] = set()
    for contents in several:
        for digest in contents.each_digest():
            (repeated if digest in seen else seen).add(digest)
    return repeated
