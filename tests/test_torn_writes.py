"""A frame of which only a part came to lie on the disk is never served as it is: it is fetched again.

The cache is a real one, filled by a daemon that was stopped; the torn frames and the bitmaps are then made what a crash
leaves. A bit is set in `ready` after its frame was written, and in `synced` after that write was synced. So a worker
that was killed leaves the bit clear in both, and a loss of power may leave it set in a `ready` of an earlier boot.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from erofs_builder.frames import FrameTable
from erofs_builder.payload import Form
from loader.cache.ready import HEADER_SIZE, boot_id
from loader.cache.writer import BufferedWriter
from tests.support.daemon import Daemon, convert, make_files, read_all
from tests.support.faulty_registry import FaultyRegistry
from tests.support.registry import docker_registry

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
BLOCK = 4096


@dataclass(frozen=True)
class Filled:
    """A daemon's root that holds all of an image, in one form; its registry, and the image's files."""

    root: Path
    form: Form
    registry: FaultyRegistry
    digests: dict[str, str]

    @property
    def image(self) -> str:
        return f"docker://{self.registry.address}/sample:1"


Published = tuple[FaultyRegistry, dict[str, str]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    directory = tmp_path_factory.mktemp("published")
    digests = make_files(directory / "tree", 4, 600_000)
    with docker_registry(directory / "registry") as address, FaultyRegistry(address) as registry:
        convert(directory / "tree", f"docker://{address}/sample:1")
        yield registry, digests


@pytest.fixture(scope="module", params=list(Form), ids=lambda form: form.value)
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, published: Published) -> Filled:
    registry, digests = published
    with Daemon(tmp_path_factory.mktemp("filled"), "--form", request.param.value) as daemon:
        ready = Filled(daemon.root, request.param, registry, digests)
        daemon.command("umount", str(daemon.mount(ready.image)))
        daemon.command("prefetch", ready.image)
    return ready


class Cached:
    """A blob's files in the cache of a daemon that does not run."""

    def __init__(self, root: Path, form: Form) -> None:
        (self.directory,) = (root / "blobs" / form.value).iterdir()
        self.table = FrameTable.decode((self.directory / "table").read_bytes())
        self._form = form

    def torn(self) -> list[int]:
        """Every third frame of several blocks."""
        return [frame.number for frame in self.table if frame.encoded_size > BLOCK][::3]

    def tear(self, frames: list[int]) -> None:
        """Half of each frame's blocks, by turns the first and the second, are what they were before: a hole."""
        writer = BufferedWriter(os.open(self.directory / "data", os.O_RDWR | os.O_CLOEXEC))
        for number in frames:
            frame = self.table[number]
            offset, size = frame.encoded_offset, frame.encoded_size
            if self._form is Form.DECODED:
                offset, size = frame.decoded_offset, frame.decoded_size
            half = size // BLOCK // 2 * BLOCK
            writer.punch(*((offset, half) if number % 2 else (offset + half, size - half)))
        writer.close()

    def clear(self, name: str, frames: list[int], boot: bytes) -> None:
        """The frames' bits are clear in the bitmap, which is of this boot."""
        bitmap = bytearray((self.directory / name).read_bytes())
        bitmap[8:24] = boot
        for frame in frames:
            bitmap[HEADER_SIZE + frame // 8] &= ~(1 << frame % 8)
        (self.directory / name).write_bytes(bitmap)


def worker_killed(cached: Cached, frames: list[int]) -> None:
    """In the middle of its writes; the machine goes on."""
    cached.clear("ready", frames, boot_id())
    cached.clear("synced", frames, boot_id())


def power_lost(cached: Cached, frames: list[int]) -> None:
    """The bitmap that is not synced reached the disk whole, the frames only in part."""
    cached.clear("ready", [], bytes(16))
    cached.clear("synced", frames, bytes(16))


def power_lost_in_the_bitmap(cached: Cached, frames: list[int]) -> None:
    """Of that bitmap itself only a part did."""
    power_lost(cached, frames)
    bitmap = (cached.directory / "ready").read_bytes()
    (cached.directory / "ready").write_bytes(bitmap[: len(bitmap) // 2])


def torn_copy(filled: Filled, root: Path) -> tuple[Cached, list[int]]:
    """A root of which some frames are torn, and their bits set; which frames."""
    shutil.copytree(filled.root, root)
    cached = Cached(root, filled.form)
    torn = cached.torn()
    assert 1 < len(torn) < len(cached.table) - 1
    cached.tear(torn)
    return cached, torn


@pytest.mark.parametrize("crash", [worker_killed, power_lost, power_lost_in_the_bitmap])
def test_a_torn_write_is_fetched_again(
    tmp_path: Path, filled: Filled, crash: Callable[[Cached, list[int]], None]
) -> None:
    cached, torn = torn_copy(filled, tmp_path / "d" / "root")
    crash(cached, torn)
    with Daemon(tmp_path / "d", "--form", filled.form.value) as daemon:
        filled.registry.ranges.clear()
        assert read_all(daemon.mount(filled.image)) == filled.digests
        ranges = [
            cached.table.covering(first, last + 1 - first, decoded=False) for _, first, last in filled.registry.ranges
        ]
        assert {frame for frames in ranges for frame in frames} == set(torn)
        assert daemon.counters()["requests_failed"] == 0
        assert daemon.command("scrub")["damaged"] == 0


def test_a_torn_write_that_the_disk_said_was_done_is_found(tmp_path: Path, filled: Filled) -> None:
    """By the kernel's checksum in the encoded form, by `scrub` in the decoded one."""
    torn_copy(filled, tmp_path / "d" / "root")
    with Daemon(tmp_path / "d", "--form", filled.form.value) as daemon:
        target = daemon.mount(filled.image)
        if filled.form is Form.DECODED:
            assert daemon.run("scrub").returncode == 12
        until = time.monotonic() + 30
        while (seen := read_all(target)) != filled.digests:
            assert filled.form is Form.ENCODED and time.monotonic() < until
            assert all(value in ("errno 5", "errno 117", filled.digests[name]) for name, value in seen.items())
        assert daemon.counters()["damaged_frames"] > 0
        assert daemon.command("scrub")["damaged"] == 0
