"""`erofs-builder dump`."""

from __future__ import annotations

import base64
import json
import stat
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import click

from erofs_builder.model import Node
from erofs_builder.payload import Form
from erofs_builder.tree import walk
from loader.cli.builder_options import config_option, form_option, opened_artifact, platform_option
from loader.cli.common import insecure_option, json_option, verbose_here_option
from loader.convert.survey import load_tree, show_path

_EARLIEST, _LATEST = -62135596800, 253402300799  # what datetime can say: years 1 to 9999


@click.command()
@click.argument("reference")
@form_option
@platform_option
@insecure_option
@config_option
@json_option
@verbose_here_option
def dump(reference: str, form: str, platform: str | None, insecure: bool, config: str | None, as_json: bool) -> None:
    """List the tree of an artifact, one line a name: mode, links, owner, size or device, time, path.

    With --json one object a line; names, targets and xattrs that are not UTF-8 have \\udcXX for each odd byte, as
    Python's os.fsdecode; xattr values are base64.
    """
    with opened_artifact(reference, platform, config, insecure) as (source, _, artifact):
        root = load_tree(source, artifact, Form(form)).root
    links = Counter(id(node) for _, node in walk(root))
    for _, node in walk(root):
        if node.children is not None:
            links[id(node)] = 2 + sum(1 for child in node.children.values() if child.is_dir)
    first: dict[int, bytes] = {}
    for path, node in walk(root):
        other = first.setdefault(id(node), path)
        click.echo(_json_line(path, node, links, other) if as_json else _line(path, node, links, other))


def _line(path: bytes, node: Node, links: Counter[int], first: bytes) -> str:
    size = f"{node.rdev[0]},{node.rdev[1]}" if _is_device(node) else str(node.size or len(node.target))
    suffix = f" -> {show_path(node.target)[1:]}" if stat.S_ISLNK(node.mode) else ""
    if first != path:
        suffix = f" link to {show_path(first)}"
    owner = f"{node.uid}/{node.gid}"
    mark = "+" if node.xattrs else " "
    head = f"{stat.filemode(node.mode)}{mark} {links[id(node)]:>3} {owner:>11} {size:>10} {_time(node)}"
    return f"{head} {show_path(path)}{suffix}"


def _time(node: Node) -> str:
    if not _EARLIEST <= node.mtime <= _LATEST:
        return f"@{node.mtime}"
    return datetime.fromtimestamp(node.mtime, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _json_line(path: bytes, node: Node, links: Counter[int], first: bytes) -> str:
    document: dict[str, Any] = {
        "path": _text(b"/" + path),
        "mode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
        "mtime": node.mtime,
        "mtime_nsec": node.mtime_nsec,
        "nlink": links[id(node)],
    }
    if stat.S_ISREG(node.mode):
        document["size"] = node.size
    if node.target:
        document["target"] = _text(node.target)
    if _is_device(node):
        document["rdev"] = list(node.rdev)
    if node.xattrs:
        document["xattrs"] = {_text(k): base64.b64encode(v).decode() for k, v in sorted(node.xattrs.items())}
    if node.fingerprint:
        document["fingerprint"] = node.fingerprint.hex()
    if first != path:
        document["link"] = _text(b"/" + first)
    return json.dumps(document, separators=(",", ":"))


def _is_device(node: Node) -> bool:
    return stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode)


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
