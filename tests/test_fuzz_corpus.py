"""Every seed and every find of the fuzzers again, within bounded memory and time (fuzz/; long runs: make fuzz)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import replay, seeds
from fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
MEGABYTES = 1536  # of address space; what the largest input takes is a fraction


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    seeds.write(directory)
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_replay(target: str, inputs: Path) -> None:
    files = sorted((inputs / target).iterdir())
    assert files
    command = [sys.executable, "-m", "fuzz.replay", "--megabytes", str(MEGABYTES), target, *map(str, files)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + replay.SECONDS * len(files))
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert re.search(rf"^{len(files)} inputs, no find$", run.stdout, re.MULTILINE)


def test_finds_belong_to_targets() -> None:
    assert {directory.name for directory in seeds.FINDS.iterdir()} <= TARGETS.keys()


@pytest.mark.parametrize(
    ("body", "sign"), [("1 / len(data[9:])", "ZeroDivisionError"), ("sleep(len(data) * 9)", "Timeout")]
)
def test_a_find_is_seen(tmp_path: Path, body: str, sign: str) -> None:
    """The replay itself: neither an error that is not among the allowed ones nor a hang passes."""
    (tmp_path / "input").write_bytes(b"x")
    program = f"""
import sys
from time import sleep
from fuzz import replay
replay.SECONDS = 1
def run(data):
    if data:
        {body}
replay.TARGETS["notify"] = replay.TARGETS["notify"]._replace(run=run)
sys.argv = ["replay", "notify", {str(tmp_path / "input")!r}]
replay.main()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert sign in run.stdout + run.stderr
