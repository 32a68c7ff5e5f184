"""A whole image of oddities, built layer by layer and flattened, equals what umoci unpacks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from erofs_builder.tree import flatten
from tests.images import catalog
from tests.images.layout import Layout
from tests.support import oracles
from tests.support.nodes import Seen, build, decoded_blobs, see_disk, see_nodes

pytestmark = pytest.mark.root


def layer_files(name: str) -> list[Path]:
    """The layers of a test image: as its oracle gets them, where that is not the same."""
    directory = catalog.image(name)
    layout = next(path for path in (directory / "oracle", directory / "oci") if path.exists())
    return [layout / "blobs/sha256" / layer["digest"][7:] for layer in Layout(layout).manifest("latest")["layers"]]


def differences(expected: dict[bytes, Seen], found: dict[bytes, Seen], undefined: set[bytes]) -> list[str]:
    """What two trees do not have in common."""
    lines = [f"only one has {path!r}" for path in expected.keys() ^ found.keys()]
    for path in expected.keys() & found.keys():
        one, other = expected[path], found[path]
        if path in undefined:
            one, other = one._replace(mtime=0), other._replace(mtime=0)
        for what, left, right in zip(Seen._fields, one, other, strict=True):
            if left != right:
                lines.append(f"{path!r}: {what}: expected {left!r}, found {right!r}")
    return lines


# Times that umoci 0.4.7 does not keep: those beyond 64 bits of nanoseconds, and a directory's that a later layer's
# whiteout changes.
NOT_KEPT = {b"lower/year-9999", b"lower", b""}


@pytest.mark.parametrize("name", ["adversarial", "layers127"])
def test_equals_umoci_unpack(name: str, tmp_path: Path) -> None:
    place = tmp_path / "umoci"
    with oracles.tmpfs(place):
        expected = see_disk(oracles.umoci_unpack(name, place))
    built = [build(layer.read_bytes()) for layer in layer_files(name)]
    found = see_nodes(flatten([layer for layer, _ in built]), decoded_blobs(built))
    undefined = {os.fsencode(path) for path in oracles.undefined_mtimes(name)} | NOT_KEPT
    # Its xattrs are incomplete too; what it has must be there.
    without = {path: seen._replace(xattrs=()) for path, seen in expected.items()}
    ours = {path: seen._replace(xattrs=()) for path, seen in found.items()}
    lines = differences(without, ours, undefined)
    assert not lines, "\n".join(lines)
    for path, seen in expected.items():
        assert set(seen.xattrs) <= set(found[path].xattrs), path


@pytest.mark.parametrize(
    ("number", "command"),
    [(1, ["tar", "--xattrs", "--xattrs-include=*", "-xpf"]), (5, ["bsdtar", "--xattrs", "-xpf"])],
    ids=["GNU tar", "bsdtar"],
)
def test_equals_what_the_archiver_extracts(number: int, command: list[str], tmp_path: Path) -> None:
    """The layers with xattrs (binary ones, capabilities, ACLs), sparse files and odd names."""
    file = layer_files("adversarial")[number]
    tmp_path.chmod(0o755)
    subprocess.run([*command, str(file), "-C", str(tmp_path)], check=True)
    layer, blob = build(file.read_bytes())
    found = see_nodes(flatten([layer]), decoded_blobs([(layer, blob)]))
    # GNU tar escapes "=" in xattr names; what OCI tools read, and so do we, is the escaped name.
    expected = {
        path: seen._replace(xattrs=tuple((name.replace(b"=", b"%3D"), value) for name, value in seen.xattrs))
        for path, seen in see_disk(tmp_path).items()
    }
    lines = differences(expected, found, {b""})
    assert not lines, "\n".join(lines)
