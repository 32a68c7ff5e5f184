"""erofs-utils 1.9 for the tests: built once by scripts/build-erofs-utils.sh, then found in the cache."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build-erofs-utils.sh"


@functools.cache
def bin_dir() -> Path:
    """The directory of mkfs.erofs, fsck.erofs and dump.erofs; builds them (a minute) if they are not there yet."""
    done = subprocess.run([str(_SCRIPT)], check=False, capture_output=True, text=True, timeout=280)
    if done.returncode:
        raise RuntimeError(f"{_SCRIPT.name} failed:\n{done.stderr[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1])


def run(program: str, *arguments: str | Path) -> str:
    """Run one of the programs; its output, or RuntimeError with what it said."""
    command = [str(bin_dir() / program), *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280)
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output[-3000:]}")
    return output
