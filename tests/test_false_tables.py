"""An image that says of another one's blob that it holds other bytes: it cannot change what the other one reads.

The forger names the honest image's blob in his artifact, with a frame table of bytes of his own, which his repository
sends. Everything about his image is consistent; only the blob's digest is not of these bytes, and nobody who fetches
frames can see that.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from bench.node import BUILDER, Node, drop_caches
from erofs_builder.digest import Digest
from erofs_builder.erofs.layout import BLOCK, SUPER_OFFSET
from erofs_builder.frames import FrameTable
from erofs_builder.hot import crc32c_state
from erofs_builder.payload import decode_payload, device_tag, encode_payload
from fuzz.formats import sealed
from loader.worker.housekeeping import CHECKPOINT_INTERVAL
from tests.images.layout import Layout
from tests.support.oracles import run

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]
FORMS = ["encoded", "decoded"]
NOT_THE_BLOB = "the image that brought its frame table is not what it says"
SIZE = 3_000_000
PATIENCE = 150  # seconds: a machine of vm-tests lives so long
HONEST, FORGED = os.urandom(SIZE), os.urandom(SIZE)


def _convert(root: Path, content: bytes) -> Layout:
    (root / "tree").mkdir(parents=True)
    (root / "tree" / "file").write_bytes(content)
    run(BUILDER, "convert", f"rootfs:{root / 'tree'}", f"oci:{root / 'layout'}:latest")
    return Layout(root / "layout")


def _blob(layout: Layout) -> str:
    return str(next(each["digest"] for each in layout.manifest("latest")["layers"] if "blob" in each["mediaType"]))


def _forge(layout: Layout, blob: str) -> None:
    """Have a layout's artifact say that its blob is this one."""
    manifest = layout.manifest("latest")
    own, other = Digest.parse(_blob(layout)), Digest.parse(blob)
    layers = []
    for layer in manifest["layers"]:
        if "metadata" in layer["mediaType"]:
            data = zstandard.ZstdDecompressor().decompress(layout.blob_path(layer["digest"]).read_bytes())
            packed = zstandard.compress(_forged_payload(data, own, other))
            layer = {"annotations": layer["annotations"]} | layout.add_bytes(packed, layer["mediaType"])
        elif layer["digest"] == str(own):
            layout.blob_path(blob).write_bytes(layout.blob_path(str(own)).read_bytes())
            layer = layer | {"digest": blob}
        layers.append(layer)
    manifest["layers"] = layers
    document = json.dumps(manifest).encode()
    described = layout.add_bytes(document, manifest["mediaType"])
    (layout.path / "index.json").unlink()
    layout.tag("latest", described | {"artifactType": manifest["artifactType"]})


def _forged_payload(data: bytes, own: Digest, other: Digest) -> bytes:
    payload = decode_payload(data)
    (table,) = payload.tables
    encoded = bytearray(table.encode())
    encoded[32:64] = other.raw
    tag, forged = (device_tag(payload.form, each).encode() for each in (own, other))
    erofs = bytearray(payload.erofs.replace(tag, forged))
    erofs[SUPER_OFFSET + 4 : SUPER_OFFSET + 8] = bytes(4)
    checksum = crc32c_state(0xFFFFFFFF, bytes(erofs[SUPER_OFFSET:BLOCK]))
    erofs[SUPER_OFFSET + 4 : SUPER_OFFSET + 8] = checksum.to_bytes(4, "little")
    return encode_payload(payload.form, bytes(erofs), [FrameTable.decode(sealed(bytes(encoded)))], payload.hints)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An honest image, and a forged one that names its blob."""
    root = tmp_path_factory.mktemp("images")
    honest, forged = _convert(root / "honest", HONEST), _convert(root / "forged", FORGED)
    _forge(forged, _blob(honest))
    assert _blob(forged) == _blob(honest)
    return f"oci:{honest.path}:latest", f"oci:{forged.path}:latest"


def _await(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def _mount(node: Node, image: str, target: Path, form: str) -> None:
    """Mount an image once the other one's file is free: a mount namespace that another test has made meanwhile keeps
    what was mounted then, and the file in use, until it ends."""
    target.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + PATIENCE
    while (done := node.try_run("mount", "--form", form, image, target)).returncode:
        assert "another frame table" in done.stderr, done.stderr
        assert time.monotonic() < until, done.stderr
        time.sleep(0.5)


@contextmanager
def _mounted(node: Node, image: str, target: Path, form: str) -> Iterator[Path]:
    _mount(node, image, target, form)
    try:
        yield target / "file"
    finally:
        node.umount(target)


@pytest.mark.parametrize("form", FORMS)
def test_what_another_table_has_verified_is_not_read(images: tuple[str, str], form: str, tmp_path: Path) -> None:
    honest, forged = images
    with Node(tmp_path / "node", "--plane", "fanotify") as node:
        with _mounted(node, forged, tmp_path / "forged", form) as file:
            assert file.read_bytes() == FORGED
            _await(lambda: form == "decoded" or NOT_THE_BLOB in node.log.read_text())
            time.sleep(2 * CHECKPOINT_INTERVAL)  # time to look once more
        assert node.log.read_text().count(NOT_THE_BLOB) == (form == "encoded")
        with _mounted(node, honest, tmp_path / "honest", form) as file:
            assert file.read_bytes() == HONEST
        node.run("add", "--form", form, forged)
        node.stop()
        node.start()
        with _mounted(node, honest, tmp_path / "honest", form) as file:
            drop_caches()
            assert file.read_bytes() == HONEST
        with _mounted(node, forged, tmp_path / "forged", form) as file:
            assert file.read_bytes() == FORGED
        assert "verified by another frame table" in node.log.read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [0, 1])
def test_two_tables_of_a_blob_are_not_open_at_once(
    images: tuple[str, str], first: int, form: str, tmp_path: Path
) -> None:
    contents = (HONEST, FORGED)
    with Node(tmp_path / "node", "--plane", "fanotify") as node:
        with _mounted(node, images[first], tmp_path / "one", form) as file:
            assert file.read_bytes()[: SIZE // 2] == contents[first][: SIZE // 2]
            (tmp_path / "other").mkdir()
            refused = node.try_run("mount", "--form", form, images[1 - first], tmp_path / "other")
            assert refused.returncode == 12
            assert "another frame table" in refused.stderr
            assert Path(images[first].split(":")[1]).parent.name in refused.stderr  # whose is in use
            drop_caches()
            assert file.read_bytes() == contents[first]
        with _mounted(node, images[1 - first], tmp_path / "other", form) as file:
            assert file.read_bytes() == contents[1 - first]


def test_a_pinned_image_keeps_what_it_has(images: tuple[str, str], tmp_path: Path) -> None:
    honest, forged = images
    with Node(tmp_path / "node", "--plane", "fanotify") as node:
        node.run("add", "--pin", "--form", "encoded", honest)
        node.run("prefetch", "--form", "encoded", honest)
        (tmp_path / "forged").mkdir()
        assert node.try_run("mount", "--form", "encoded", forged, tmp_path / "forged").returncode == 12
        before = node.ask("stats")["counters"]["fetches"]
        with _mounted(node, honest, tmp_path / "honest", "encoded") as file:
            assert file.read_bytes() == HONEST
        assert node.ask("stats")["counters"]["fetches"] == before
