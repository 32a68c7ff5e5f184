"""How a conversion grows from 10^3 to 10^6 files: its time and the memory at its peak."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Row
from tests.images.layout import write_layers
from tests.support.endless import Files

SIZES = (1_000, 10_000, 100_000, 1_000_000)
FILE_SIZE = 300
_PROGRAM = """
import sys
from loader.cli.builder import cli
from loader.cli.common import run
try:
    run(cli, "erofs-builder")
finally:
    print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""


def rows(_: int) -> list[Row]:
    """One row a size; each is one conversion of a plain layer of small files, a hundred in a directory."""
    return [_row(count) for count in SIZES]


def _row(count: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="erofs-growth-", dir="/var/tmp") as name:
        scratch = Path(name)
        _write_image(count, scratch)
        seconds, peak = _convert(scratch)
    ours = f"{seconds:.1f} s, {seconds / count * 1e6:.0f} µs a file"
    return Row("growth", f"memory to convert {count:,} files", ours, "-", peak / 1e6, 1000, larger=False, unit=" MB",
               samples={"seconds": [seconds], "peak": [peak], "files": [count]})  # fmt: skip


def _write_image(count: int, scratch: Path) -> None:
    source = Files(count, FILE_SIZE)
    with open(scratch / "layer.tar", "wb") as out:
        while chunk := source.read(1 << 20):
            out.write(chunk)
    write_layers(scratch / "image", [scratch / "layer.tar"], ["none"], {})
    (scratch / "layer.tar").unlink()


def _convert(scratch: Path) -> tuple[float, int]:
    """Seconds, and bytes at the peak; of the process itself, as ru_maxrss begins with its parent's."""
    command = ["convert", f"oci:{scratch}/image:latest", f"oci:{scratch}/artifact:latest"]
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *command], check=True, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    shutil.rmtree(scratch / "artifact")
    return seconds, int(done.stderr.split()[-1]) << 10
