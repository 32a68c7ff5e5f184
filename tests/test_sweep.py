"""What a dead session left behind is swept; what a living one uses is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sweep


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that was given a path in the session's directory."""
    program = "import time; print('up', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(tmp_path / "sessions" / "one" / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # /proc shows no arguments until the program runs
        yield process
        process.kill()


def _session(tmp_path: Path, note: str) -> Path:
    base = tmp_path / "sessions" / "one"
    base.mkdir(parents=True)
    (base / ".session").write_text(note)
    return base


def test_processes_of_a_dead_session_are_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    base = _session(tmp_path, "1 this-is-no-start-time")
    assert len(sweep.sweep_dead_sessions(base.parent)) == 1
    assert sleeper.wait(10) == -9
    assert sweep.sweep_dead_sessions(base.parent) == []


def test_a_living_session_is_left_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    base = _session(tmp_path, "")
    sweep.note_session(base)
    assert sweep.sweep_dead_sessions(base.parent) == []
    assert sleeper.poll() is None


@pytest.mark.root
def test_mounts_of_a_dead_session_are_unmounted(tmp_path: Path) -> None:
    base = _session(tmp_path, "1 this-is-no-start-time")
    for name in ("a mount", "a mount/within"):
        (base / name).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "sweep-test", base / name], check=True)
    assert sweep.mounts_below(base) == [str(base / "a mount/within"), str(base / "a mount")]
    sweep.sweep_dead_sessions(base.parent)
    assert sweep.mounts_below(base) == []
    assert list((base / "a mount").iterdir()) == []
