"""Which pages a command touches, as the kernel's trace events tell it, and the trace that is made of that."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import pytest

from bench.node import Node
from erofs_builder.frame_list import decode_frames
from erofs_builder.page_trace import PageRun, decode_page_trace
from loader.convert.convert import Request, convert
from loader.errors import KernelSupportError, LoaderError
from loader.page_recorder import record_pages
from loader.registry.config import RegistryConfig
from loader.registry.layout import Layout
from loader.trace import find_pages, find_trace
from mounts.readahead import backing_devices, set_readahead
from mounts.tracefs import PageEvents, Touched
from tests.support.oci import add_image, new_layout, tar_of

READER = """
import mmap, os, sys
root = sys.argv[1]
with open(root + "/big", "rb") as file:
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        pages[60 * 4096], pages[61 * 4096 + 5], pages[50 * 4096]
    os.pread(file.fileno(), 3 * 4096, 10 * 4096)
    os.pread(file.fileno(), 10, 60 * 4096)
with open(root + "/a/small name", "rb") as file:
    file.read()
"""
TOUCHED = [
    PageRun(b"big", 60, 61),
    PageRun(b"big", 50, 50),
    PageRun(b"big", 10, 12),
    PageRun(b"a/small name", 0, 2),
]


def test_lines_of_the_kernel() -> None:
    seen = PageEvents()
    seen.feed(
        b"   cat-9 [001] ..... 1.5: mm_filemap_fault: dev=0:45 ino=1a2b ofs=8192\n"
        b"CPU:1 [LOST 17 EVENTS]\nnonsense\n"
        b"   cat-9 [001] ..... 1.6: mm_filemap_get_pages: dev=0:300 ino=3 ofs=4096-20479\n"
        b"   cat-9 [001] ..... 1.6: mm_filemap_get_pages: dev=8:1 ino=3 ofs=4096-8191\n"
    )
    minor_of_many = (300 & 0xFF) | (300 & ~0xFF) << 12
    assert seen.events == [Touched(45, 0x1A2B, 2, 2), Touched(minor_of_many, 3, 1, 3), Touched(8 << 8 | 1, 3, 1, 1)]
    assert seen.lost == 17


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = new_layout(tmp_path / "oci")
    files = {"big": random.Random(1).randbytes(700_000), "a/small name": b"x" * 9000, "other": b"y" * 9000}
    add_image(layout, [tar_of(files)], "image")
    convert(Request(f"oci:{layout.path}:image", f"oci:{layout.path}:artifact"), RegistryConfig())
    return layout


@pytest.mark.root
def test_a_command_is_recorded_and_its_trace_published(layout: Layout, tmp_path: Path) -> None:
    image, target = f"oci:{layout.path}:image", tmp_path / "mnt"
    target.mkdir()
    with Node(tmp_path / "node", "--plane", "fanotify") as node:
        assert node.try_run("trace", image, "--", "true").returncode == 10
        node.run("mount", "--form", "decoded", image, target)
        try:
            (target / "big").read_bytes()  # what is cached already is seen all the same
            command = [sys.executable, "-c", READER, str(target)]
            answer = node.run("trace", image, "--json", "--output", tmp_path / "trace", "--", *command)
            assert json.loads(answer)["pages"] == 9
            assert node.try_run("trace", image, "--no-publish", "--", "false").returncode == 1
            assert "touched nothing" in node.try_run("trace", image, "--", "true").stderr
            assert node.try_run("trace", image, "--output", tmp_path / "x").returncode == 2
        finally:
            node.umount(target)
    assert decode_page_trace((tmp_path / "trace").read_bytes()) == TOUCHED
    digest = layout.resolve("artifact").digest
    assert find_pages(layout, digest) == TOUCHED
    assert len(decode_frames(find_trace(layout, digest))) == 2


@pytest.mark.root
def test_readahead_is_as_before(layout: Layout, tmp_path: Path) -> None:
    image, target = f"oci:{layout.path}:image", tmp_path / "mnt"
    before = backing_devices()
    with Node(tmp_path / "node", "--plane", "fanotify", "--form", "decoded") as node:
        node.mount(image, target)
        try:
            device = _only(backing_devices() - before)
            usual = set_readahead(device, 64)
            with pytest.raises(LoaderError, match="stop here"):
                record_pages([target], _fail)
            assert set_readahead(device, usual) == 64 and usual > 0
        finally:
            node.umount(target)


def _only(devices: set[str]) -> str:
    """The one of these that is left once the mounts of tests beside this one are gone."""
    until = time.monotonic() + 120
    while len(devices) > 1 and time.monotonic() < until:
        time.sleep(0.1)
        devices &= backing_devices()
    (device,) = devices
    return device


def _fail() -> None:
    raise LoaderError("stop here")


def test_what_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(devices: object) -> None:
        raise PermissionError(1, "no")

    monkeypatch.setattr("loader.page_recorder.page_events", refuse)
    with pytest.raises(KernelSupportError, match="cannot record"):
        record_pages([tmp_path], _fail)
