"""The systemd unit's own bounds, as systemd judges them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

UNIT = Path(__file__).parent.parent / "systemd/erofs-loader.service"


def test_exposure() -> None:
    """What is left is what mounting for the whole machine takes: its mount namespace, CAP_SYS_ADMIN, the network."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 3.0
    assert "ignoring" not in done.stderr


def test_it_never_gives_up() -> None:
    """A unit that failed has its descriptor store closed, on which mounts depend."""
    head, _, service = UNIT.read_text().partition("[Service]")
    assert "\nStartLimitIntervalSec=0\n" in head
    assert "\nRestart=always\n" in service


def test_systemd_understands_it() -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(UNIT)]
    said = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    wrong = [line for line in said if UNIT.name in line and "is not executable" not in line]  # it may not be installed
    assert not wrong
