"""Stored metadata is checked each time, and mended where it lies. Under mounts: test_disk_faults.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from erofs_builder.digest import Digest
from erofs_builder.payload import Form
from loader.cache.layout import Layout
from loader.cache.state import ImageRecord, State
from loader.errors import NotFoundError, RegistryError
from loader.worker.counters import Counters
from loader.worker.payloads import DamagedPayloadError, Payloads
from loader.worker.sharing import PageSharing, announced_bytes, shared_copy
from tests.test_worker_images import sample_payload


def rot(path: Path) -> None:
    """One bit in every 1,000 bytes."""
    data = bytearray(path.read_bytes())
    for offset in range(500, len(data), 1000):
        data[offset] ^= 4
    with path.open("r+b") as stream:  # the same inode: that is what is mounted
        stream.write(data)


class Node:
    """A stored payload, and a registry that has it or not."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.prepare()
        self.state = State(self.layout.database)
        self.right, self.payload = sample_payload(Form.ENCODED)
        self.image = Digest.of(b"image")
        self.there, self.fetches = True, 0
        self.payloads = Payloads(self.layout, self.state, Counters(), self._fetch)
        self.payloads.store(self.image, Form.ENCODED, self.right, self.payload)
        self.state.add_image(ImageRecord(self.image, "a", "a", 0, ()), Form.ENCODED, Digest.of(self.right))
        self.path = self.layout.payload(self.image, Form.ENCODED)
        self.payloads.load(self.image, Form.ENCODED)  # what was just stored is not read

    def _fetch(self, image: ImageRecord, form: Form) -> bytes:
        self.fetches += 1
        if not self.there:
            raise RegistryError("away")
        return self.right


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.state.close()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(4096))


@pytest.mark.parametrize("damage", [rot, _cut, _lengthen])
def test_a_damaged_payload_is_mended_in_place(node: Node, damage: object) -> None:
    assert callable(damage)
    damage(node.path)
    inode = node.path.stat().st_ino
    with pytest.raises(DamagedPayloadError):
        node.payloads.load(node.image, Form.ENCODED)
    assert node.payloads.sound(node.image, Form.ENCODED).erofs == node.payload.erofs
    assert (node.path.read_bytes(), node.path.stat().st_ino, node.fetches) == (node.right, inode, 1)
    assert node.payloads.load(node.image, Form.ENCODED)[1].tables


def test_without_its_registry_it_stays_refused(node: Node) -> None:
    rot(node.path)
    node.there = False
    with pytest.raises(RegistryError):
        node.payloads.sound(node.image, Form.ENCODED)
    with pytest.raises(DamagedPayloadError):
        node.payloads.load(node.image, Form.ENCODED)


def test_what_comes_is_held_against_what_was_stored(node: Node) -> None:
    rot(node.path)
    node.right = bytes(len(node.right))
    with pytest.raises(Exception, match="metadata of a"):
        node.payloads.sound(node.image, Form.ENCODED)


def test_one_that_is_gone_is_not_here(node: Node) -> None:
    node.path.unlink()
    assert not node.payloads.has(node.image, Form.ENCODED)
    with pytest.raises(NotFoundError):
        node.payloads.sound(node.image, Form.ENCODED)
    assert list(node.payloads.stored()) == []


def test_the_copy_with_fingerprints_is_checked_too(node: Node) -> None:
    copy = shared_copy(node.path)
    copy.write_bytes(announced_bytes(node.right))
    assert not node.payloads.check(node.image, Form.ENCODED)
    rot(copy)
    assert node.payloads.check(node.image, Form.ENCODED)
    assert copy.read_bytes() == announced_bytes(node.right) and node.fetches == 0


def test_a_damaged_copy_is_mended_in_place_when_it_is_mounted_again(node: Node) -> None:
    """An earlier mount may read it."""
    sharing = PageSharing("auto", node.layout.tmp)
    copy = sharing.announced(node.path)
    inode = copy.stat().st_ino
    rot(copy)
    assert sharing.announced(node.path) == copy
    assert (copy.read_bytes(), copy.stat().st_ino) == (announced_bytes(node.right), inode)
