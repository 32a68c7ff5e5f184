"""A scratch ext4 for the guest, as a sparse file."""

from __future__ import annotations

import subprocess
from pathlib import Path

SIZE = 4 << 30


def make(path: Path, size: int = SIZE) -> Path:
    """An empty ext4 of `size` bytes at `path`; only what the guest writes takes space."""
    with path.open("wb") as stream:
        stream.truncate(size)
    options = ["-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=1,nodiscard,lazy_journal_init=1"]
    subprocess.run(["mkfs.ext4", *options, str(path)], check=True)
    return path
