"""The kill storm (bench/storm), short: every kind of reader, three images in both forms, processes killed at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short name: there are sockets far below it."""
    return tmp_path_factory.mktemp("s")


def storm(directory: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.storm", "--keep", "--nodes", "1", "--rate", "8e6", *options]
    environment = os.environ | {"TMPDIR": str(directory)}
    with (directory / "output").open("w+") as output:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        text = output.read()
    assert done.returncode == 0, text
    report: dict[str, Any] = json.loads(text[text.index("\n{") :])
    return report


def test_single_processes_die(directory: Path) -> None:
    report = storm(directory, "--kills", "40", "--everything", "0", "--readers", "16")
    assert report["kills in all"] == 40
    assert report["worker deaths with requests unanswered"] > 0
    assert report["wrong bytes, encoded"] == report["wrong bytes, decoded"] == 0
    assert report["descriptors leaked"] == report["readers stuck"] == 0
    assert report["reads in all"] > 16


def test_everything_dies_at_once(directory: Path) -> None:
    report = storm(directory, "--kills", "0", "--everything", "4", "--images", "1")
    assert report["kills in all"] == 4
    assert report["wrong bytes, encoded"] == report["wrong bytes, decoded"] == 0
    assert report["decoded mounts fenced"] == report["encoded mounts right again without a remount"] == 4
