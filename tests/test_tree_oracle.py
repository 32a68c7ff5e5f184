"""Random layers over a handful of names, flattened, against umoci unpack."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from erofs_builder.errors import FormatError
from erofs_builder.tree import flatten
from tests.images.layout import write_layers
from tests.support.nodes import build, decoded_blobs, see_disk, see_nodes
from tests.support.tars import Tar

pytestmark = pytest.mark.root

NAMES = ["a", "b", "c", "a/x", "a/y", "b/x", "b/z", "a/x/p", "b/x/q", "c/d/e", "l", "l/n"]
TARGETS = ["a", "/b", "../a", "c/d", "nowhere"]


def random_layer(source: random.Random, linkable: list[str]) -> Tar:
    """A few entries; files collide with directories, symlinks with parents, whiteouts with all of them."""
    tar = Tar().add("./", "dir", mtime=5)
    for _ in range(source.randrange(1, 9)):
        name = source.choice(NAMES)
        kind = source.choice(["file", "file", "dir", "dir", "symlink", "link", "fifo", "whiteout", "opaque"])
        mode = source.choice([0o644, 0o755, 0o700])
        if kind == "whiteout":
            parent, slash, last = name.rpartition("/")
            tar.add(f"{parent}{slash}.wh.{last}")
        elif kind == "opaque":
            tar.add(source.choice(["a", "b", "c/d"]) + "/.wh..wh..opq")
        elif kind == "symlink":
            tar.add(name, kind, linkname=source.choice(TARGETS), mode=0o777)
        elif kind == "link":
            if linkable:
                tar.add(name, kind, linkname=source.choice(linkable))
        else:
            tar.add(name, kind, data=name.encode() * source.randrange(9) if kind == "file" else b"", mode=mode)
            if kind != "dir":
                linkable.append(name)
    return tar


@pytest.mark.parametrize("seed", range(60))
def test_random_layers(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    linkable: list[str] = []
    tars = [bytes(random_layer(source, linkable)) for _ in range(source.randrange(1, 4))]
    files = [tmp_path / f"{number}.tar" for number in range(len(tars))]
    for file, tar in zip(files, tars, strict=True):
        file.write_bytes(tar)
    write_layers(tmp_path / "oci", files, ["none"] * len(files), {})
    command = ["umoci", "unpack", "--image", f"{tmp_path}/oci:latest", str(tmp_path / "bundle")]
    unpacked = subprocess.run(command, capture_output=True)
    built = [build(tar) for tar in tars]
    try:
        root = flatten([layer for layer, _ in built])
    except FormatError:
        assert unpacked.returncode, "umoci can apply these layers"
        return
    if unpacked.returncode:
        return  # links to themselves or to what they replace, which flatten() accepts
    expected, found = see_disk(tmp_path / "bundle/rootfs"), see_nodes(root, decoded_blobs(built))
    assert found.keys() == expected.keys()
    for path, seen in expected.items():
        other = found[path]
        assert (seen.mode, seen.size, seen.content, seen.first) == (
            other.mode,
            other.size,
            other.content,
            other.first,
        ), path
