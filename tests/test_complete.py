"""An image that is whole costs its readers nothing: its blobs lose their marks, and the kernel asks for it no more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Daemon, convert, drop_caches, make_tree, read_all

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


def _events(daemon: Daemon) -> int:
    return int(daemon.command("status")["keeper"]["counters"]["events"])


def _wait_until_complete(daemon: Daemon) -> None:
    until = time.monotonic() + PATIENCE
    while (stats := daemon.command("stats"))["complete_blobs"] != stats["open_blobs"]:
        assert time.monotonic() < until, stats
        time.sleep(0.2)


def test_a_complete_image_asks_nobody_in_either_form(tmp_path: Path) -> None:
    digests = make_tree(tmp_path / "tree")
    image = f"oci:{tmp_path}/layout:1"
    convert(tmp_path / "tree", image)
    with Daemon(tmp_path / "d") as daemon:
        targets = [tmp_path / form for form in ("encoded", "decoded")]
        for target in targets:
            target.mkdir()
            daemon.command("mount", image, str(target), "--form", target.name)
        assert read_all(targets[0]) == digests
        assert _events(daemon) > 0
        for target in targets:
            daemon.command("prefetch", image, "--form", target.name)
        _wait_until_complete(daemon)
        events = _events(daemon)
        drop_caches()
        assert [read_all(target, 1) for target in targets] == [digests, digests]
        assert _events(daemon) == events
