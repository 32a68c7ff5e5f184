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
