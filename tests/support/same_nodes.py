"""Compare two Node trees in everything that EROFS holds."""

from __future__ import annotations

from typing import Any

from erofs_builder.model import Node


def describe(root: Node) -> dict[bytes, dict[str, Any]]:
    """Every path with what its node says; extents name blobs by digest, hard links by their first path."""
    found: dict[bytes, dict[str, Any]] = {}
    first: dict[int, bytes] = {}
    pending = [(b"/", root)]
    while pending:
        path, node = pending.pop()
        found[path] = {
            "mode": node.mode,
            "owner": (node.uid & 0xFFFFFFFF, node.gid & 0xFFFFFFFF),
            "mtime": (node.mtime, node.mtime_nsec),
            "size": node.size,
            "target": node.target,
            "rdev": node.rdev,
            "xattrs": dict(sorted(node.xattrs.items())),
            "fingerprint": node.fingerprint,
            "extents": [(str(extent.blob.digest) if extent.blob else None, *extent[1:]) for extent in node.extents],
            "link": first.setdefault(id(node), path),
        }
        pending += sorted(((path + b"/" + name, child) for name, child in (node.children or {}).items()), reverse=True)
    return found


def differences(expected: Node, actual: Node) -> list[str]:
    """One line for each path that differs."""
    before, after = describe(expected), describe(actual)
    return [
        f"{path!r}: {before.get(path)} → {after.get(path)}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]
