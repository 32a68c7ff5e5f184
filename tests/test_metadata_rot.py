"""An image's metadata rots on a node's disk: what is mounted is right all the same, and what is read of it."""

from __future__ import annotations

import os
import signal
import time
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
from loader.worker.sharing import announced_bytes, shared_copy
from tests.support.daemon import Daemon, convert, drop_caches, make_tree, read_all
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry
from tests.test_worker_images import sample_payload

FORMS = ("encoded", "decoded")
Published = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A registry's address and what `sample:1` holds."""
    directory = tmp_path_factory.mktemp("published")
    digests = make_tree(directory / "tree")
    with docker_registry(directory / "registry") as address:
        convert(directory / "tree", f"docker://{address}/sample:1")
        yield address, digests


def rot(path: Path) -> None:
    """One bit in every 1,000 bytes."""
    data = bytearray(path.read_bytes())
    for offset in range(500, len(data), 1000):
        data[offset] ^= 4
    with path.open("r+b") as stream:  # the same inode: that is what is mounted
        stream.write(data)


def payload_of(daemon: Daemon) -> Path:
    (path,) = (daemon.root / "images").glob("*/*.payload")
    return path


@pytest.mark.root
@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", FORMS)
def test_rotten_metadata_is_fetched_again_before_it_is_mounted(tmp_path: Path, published: Published, form: str) -> None:
    address, digests = published
    with FaultyRegistry(address) as registry, Daemon(tmp_path / "d", "--form", form) as daemon:
        image = f"docker://{registry.address}/sample:1"
        target = daemon.mount(image)
        right = payload_of(daemon).read_bytes()
        daemon.command("umount", str(target))
        rot(payload_of(daemon))
        registry.off = True
        os.kill(daemon.worker(), signal.SIGKILL)  # it knows this image's manifest, and so its metadata, by heart
        digest = payload_of(daemon).parent.name
        refused = daemon.run("mount", digest, str(target))
        assert refused.returncode == 11 and read_all(target) == {}
        registry.off = False
        daemon.mount(image)
        drop_caches()
        assert read_all(target) == digests
        assert payload_of(daemon).read_bytes() == right
        assert daemon.counters()["damaged_payloads"] > 0


@pytest.mark.root
@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", FORMS)
def test_scrub_repairs_metadata_under_its_mount(tmp_path: Path, published: Published, form: str) -> None:
    address, digests = published
    with Daemon(tmp_path / "d", "--form", form) as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        payload = payload_of(daemon)
        right, inode = payload.read_bytes(), payload.stat().st_ino
        assert daemon.command("scrub")["payloads"] == 1
        rot(payload)
        done = daemon.run("scrub")
        assert done.returncode == 12 and "1 were damaged" in done.stdout
        assert (payload.read_bytes(), payload.stat().st_ino) == (right, inode)
        drop_caches()
        assert read_all(target) == digests
        assert daemon.command("scrub")["damaged"] == 0


@pytest.mark.root
@pytest.mark.timeout(240)
def test_a_new_worker_repairs_what_is_mounted(tmp_path: Path, published: Published) -> None:
    address, digests = published
    with Daemon(tmp_path / "d") as daemon:
        target = daemon.mount(f"docker://{address}/sample:1")
        payload = payload_of(daemon)
        right = payload.read_bytes()
        rot(payload)
        os.kill(daemon.worker(), signal.SIGKILL)
        until = time.monotonic() + 30
        while payload.read_bytes() != right and time.monotonic() < until:
            time.sleep(0.1)
        assert payload.read_bytes() == right
        drop_caches()
        assert read_all(target) == digests


# The same without a kernel


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
