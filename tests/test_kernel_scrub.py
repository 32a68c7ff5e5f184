"""`scrub` of the kernel's own cache files: holes are none of its business, what is wrong is written again or culled.

Without a kernel: the files are ordinary ones, the keeper lends descriptors and culls as the real one does.
vm-tests/scenarios/bit_rot.py plays the same under a mount.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.payload import Form, device_tag
from loader.cache.claims import FlightTable
from loader.cache.files import CacheFile, store_table
from loader.cache.layout import Layout
from loader.cache.state import ImageRecord, State
from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.worker.counters import Counters
from loader.worker.eviction import Culler
from loader.worker.kernel_look import KernelLook
from loader.worker.link import CallError
from loader.worker.mounting import image_fsid
from loader.worker.objects import Objects, StoredMetadata, object_name
from loader.worker.payloads import Payloads
from loader.worker.scrub import Scrubber
from loader.worker.scrub_metadata import MetadataScrubber
from tests.support.cache_files import sample, table_of

VOLUME = "erofs,domain"
FRAMES = 12
PAYLOAD = 131_072


class _Keeper:
    """Looks by the keeper's own code, and culls what nothing has open."""

    def __init__(self, directory: Path) -> None:
        self.plane = CachefilesPlane.__new__(CachefilesPlane)
        self.plane.directory = directory
        self.busy = False

    def call(self, call: str, timeout: float, /, **arguments: Any) -> tuple[dict[str, Any], int | None]:
        if call == "look":
            return {}, self.plane.look(arguments["directory"], arguments["name"])
        assert call == "cull"
        if self.busy:
            raise CallError("in use", errno.EBUSY)
        (self.plane.directory / arguments["directory"] / arguments["name"]).unlink()
        return {}, None


class _Mounting:
    def __init__(self) -> None:
        self._lock = threading.Lock()

    def exclusive(self) -> threading.Lock:
        return self._lock


@dataclass
class Node:
    """A blob of 12 frames, of which all but the last were written into an object that the kernel opened."""

    layout: Layout
    objects: Objects
    keeper: _Keeper
    scrubber: Scrubber
    counters: Counters
    backing: Path
    tag: str
    payload: Path
    fsid: str
    wanted: list[int] = field(default_factory=list)

    @property
    def file(self) -> CacheFile:
        file = self.objects.open_file(f"{VOLUME}/{self.tag}")
        assert file is not None
        return file

    @property
    def metadata(self) -> Path:
        """What the kernel has of the image's metadata, of its second mount."""
        return self.backing.with_name(f"D{self.fsid}")

    def open_metadata(self, number: int) -> None:
        """As the kernel does, and reads some of it: then all is there."""
        fd = os.open(self.metadata, os.O_RDWR | os.O_CREAT, 0o600)
        assert self.objects.add_cachefiles(number, VOLUME, self.fsid, fd) == PAYLOAD
        item = self.objects.get(number)
        assert item is not None and item.metadata is not None
        item.metadata.fill()

    def scrub(self) -> dict[str, Any]:
        return list(self.scrubber.scrub())[-1]

    def damage(self, frame: int) -> None:
        offset, size = self.file.place(self.file.table[frame])
        _flip(self.backing, offset + size // 2)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes((byte ^ 1,)))


def _no_fetch(*arguments: object) -> bytes:
    raise AssertionError("nothing is fetched here")


@pytest.fixture(params=list(Form), ids=lambda form: form.value)
def node(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    form: Form = request.param
    blob = sample(FRAMES)
    table, layout = table_of(blob), Layout(tmp_path)
    layout.prepare()
    state = State(layout.database)
    digest = table.blob_digest
    state.add_image(ImageRecord(digest, "a", "a", 0, ((digest, table.blob_size),)), form, digest)
    layout.blob(digest, form).mkdir(parents=True)
    store_table(layout, form, table)
    tag = device_tag(form, digest)
    backing = tmp_path / f"cachefiles/cache/I{VOLUME}/@00/D{tag}"
    backing.parent.mkdir(parents=True)
    keeper = _Keeper(tmp_path / "cachefiles")
    fsid, payload = image_fsid(digest, form), tmp_path / "payload"
    payload.write_bytes(os.urandom(PAYLOAD))
    stored = StoredMetadata(payload, payload.read_bytes)
    objects = Objects(
        layout,
        lambda name: stored if name.partition(".")[0] == fsid else None,
        lambda wanted: (form, digest) if wanted == tag else None,
    )
    size = objects.add_cachefiles(1, VOLUME, tag, os.open(backing, os.O_RDWR | os.O_CREAT, 0o600))
    os.truncate(backing, size)
    counters, flights = Counters(), FlightTable(1, 1, (1, 1, 1))
    look = KernelLook(layout, Culler(layout, state, keeper), objects, keeper)  # type: ignore[arg-type]
    scrubber = Scrubber(
        layout, state, objects, _Mounting(), flights, keeper, counters, look,  # type: ignore[arg-type]
        MetadataScrubber(Payloads(layout, state, counters, _no_fetch), look),
    )  # fmt: skip
    made = Node(layout, objects, keeper, scrubber, counters, backing, tag, payload, f"{fsid}.1")
    monkeypatch.setattr(flights, "want", lambda file, frames, *rest: made.wanted.extend(frames))
    for frame in list(table)[:-1]:
        offset, size = made.file.place(frame)
        made.file.write(frame, bytes(blob.decoded if form is Form.DECODED else blob.encoded)[offset : offset + size])
    yield made
    objects.close(1)
    state.close()


def test_nothing_is_wrong(node: Node) -> None:
    report = node.scrub()
    assert (report["frames"], report["damaged"], report["skipped"]) == (FRAMES - 1, 0, [])
    node.objects.close(1)
    report = node.scrub()
    assert (report["frames"], report["damaged"], report["skipped"]) == (FRAMES - 1, 0, [])
    assert node.backing.exists()


def test_what_is_wrong_of_a_mounted_file_is_fetched_again(node: Node) -> None:
    for frame in (2, 7):
        node.damage(frame)
    report = node.scrub()
    assert (report["damaged"], node.wanted) == (2, [2, 7])
    assert not node.file.ready[2] and not node.file.has(7) and node.file.ready[3]
    assert node.counters.get("damaged_frames") == 2 and node.backing.exists()


def test_a_hole_is_no_damage(node: Node) -> None:
    """The kernel may throw an object away and make it anew; it asks for what is missing."""
    os.truncate(node.backing, 0)
    os.truncate(node.backing, node.file.size)
    assert (node.scrub()["damaged"], node.wanted) == (0, [])
    node.objects.close(1)
    assert node.scrub()["damaged"] == 0


def test_a_file_that_nothing_has_open_is_culled_if_it_is_wrong(node: Node) -> None:
    node.damage(5)
    node.objects.close(1)
    known = node.layout.object(object_name(VOLUME, node.tag))
    node.keeper.busy = True
    assert node.scrub()["damaged"] == 1
    assert node.backing.exists() and known.exists()
    node.keeper.busy = False
    assert node.scrub()["damaged"] == 1
    assert not node.backing.exists() and not known.exists()
    assert node.scrub()["frames"] == 0


def test_a_file_without_a_name_is_said_to_be_skipped(node: Node) -> None:
    node.backing.unlink()
    report = node.scrub()
    assert report["frames"] == 0 and node.tag in report["skipped"][0]


def test_metadata_is_held_against_the_payload_and_written_over(node: Node) -> None:
    node.open_metadata(2)
    report = node.scrub()
    assert (report["payloads"], report["damaged"], report["skipped"]) == (1, 0, [])
    for offset in (0, 70_000, PAYLOAD - 1):
        _flip(node.metadata, offset)
    assert node.scrub()["damaged"] == 1
    assert node.metadata.read_bytes() == node.payload.read_bytes()
    assert node.scrub()["damaged"] == 0
    node.objects.close(2)


def test_metadata_that_nothing_has_mounted_is_culled_if_it_is_wrong(node: Node) -> None:
    node.open_metadata(2)
    node.objects.close(2)
    _flip(node.metadata, 5)
    node.keeper.busy = True
    report = node.scrub()
    assert report["damaged"] == 1 and node.fsid in report["skipped"][0] and node.metadata.exists()
    node.keeper.busy = False
    assert node.scrub()["damaged"] == 1
    assert not node.metadata.exists() and node.scrub()["payloads"] == 0


def test_a_hole_in_metadata_is_no_damage(node: Node) -> None:
    node.open_metadata(2)
    os.truncate(node.metadata, 8192)
    os.truncate(node.metadata, PAYLOAD)
    assert node.scrub()["damaged"] == 0
    node.objects.close(2)


@pytest.mark.parametrize(
    ("directory", "name"), [("/etc", "passwd"), ("cache/../..", "a"), ("cache", "a/b"), ("l", "a")]
)
def test_no_other_file_is_lent(tmp_path: Path, directory: str, name: str) -> None:
    plane = CachefilesPlane.__new__(CachefilesPlane)
    plane.directory = tmp_path / "cachefiles"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a").touch()
    plane.directory.mkdir()
    (plane.directory / "l").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError) as caught:
        plane.look(directory, name)
    assert caught.value.errno in (errno.EPERM, errno.ENOTDIR, errno.ELOOP)
