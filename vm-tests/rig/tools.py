"""Programs of other people that the host's side needs."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from rig.table import HERE


@functools.cache
def erofs_utils() -> Path:
    """The directory of erofs-utils 1.9's programs, built on first use (that needs the network, so `run` asks early)."""
    script = HERE.parent / "scripts" / "build-erofs-utils.sh"
    return Path(subprocess.run([script], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
