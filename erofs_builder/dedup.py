"""Across layers: content that several blobs hold is read from the lowest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from erofs_builder.layer import Layer
from erofs_builder.model import Blob, Extent, Node

_Where = tuple[Blob, int, int]  # blob, frame, offset in it


class Deduplicator:
    """Finds the pieces of upper blobs that a lower blob holds, and points nodes at the lower copy."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._moves: dict[_Where, Extent] = {}
        self._new_nodes: dict[Node, Node] = {}
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
        if not self._moves:
            return
        stack = [root]
        while stack:
            children = stack.pop().children or {}
            for name, node in children.items():
                if node.children is not None:
                    stack.append(node)
                elif node.extents:
                    children[name] = self._moved(node)

    def _moved(self, node: Node) -> Node:
        known = self._new_nodes.get(node)
        if known is not None:
            return known
        several = len(node.extents) > 1
        extents = tuple(self._move(extent, several) for extent in node.extents)
        if extents == node.extents:
            return node
        moved = self._new_nodes[node] = replace(node, extents=extents)
        return moved

    def _move(self, extent: Extent, several: bool) -> Extent:
        if extent.blob is None:
            return extent
        lower = self._moves.get((extent.blob, extent.frame, extent.frame_offset))
        if lower is None or lower.length != extent.length or (several and lower.frame_offset):
            return extent
        return lower
