"""Across layers: content that several blobs hold is read from the lowest of them."""

from __future__ import annotations

from collections.abc import Sequence

from erofs_builder.layer import Layer
from erofs_builder.model import Blob, Extent, Node, replace_extents

_Where = tuple[Blob, int, int]  # blob, frame, offset in it


class Deduplicator:
    """Finds the pieces of upper blobs that a lower blob holds, and points nodes at the lower copy."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._moves: dict[_Where, Extent] = {}
        first: dict[bytes, Extent] = {}
        blobs: set[Blob] = set()
        for layer in layers:
            if layer.blob is None or layer.blob in blobs:
                continue
            blobs.add(layer.blob)
            self._compare(layer.blob, layer, first)

    def _compare(self, blob: Blob, layer: Layer, first: dict[bytes, Extent]) -> None:
        for digest, frame, offset, length in layer.contents:
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
        several = len(node.extents) > 1
        return tuple(self._move(extent, several) for extent in node.extents)

    def _move(self, extent: Extent, several: bool) -> Extent:
        if extent.blob is None:
            return extent
        lower = self._moves.get((extent.blob, extent.frame, extent.frame_offset))
        if lower is None or lower.length != extent.length or (several and lower.frame_offset):
            return extent
        return lower
