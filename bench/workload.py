"""The application whose start is measured: a python3 + numpy + requests program of the Debian image."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

PROGRAM = """\
import json, numpy, requests
matrix = numpy.arange(1_000_000, dtype=float).reshape(1000, 1000)
request = requests.Request("GET", "http://example.invalid/", params={"q": 1}).prepare()
print(json.dumps({"numpy": numpy.__version__, "trace": float(numpy.trace(matrix)), "url": request.url}), flush=True)
"""
EXPECTED = '"trace": 499999500.0, "url": "http://example.invalid/?q=1"'


def command(root: Path) -> list[str]:
    """What starts the program from the file tree `root`.

    chroot(8) stands in for the container runtime, whose own cost is the same for all.
    """
    environment = ["/usr/bin/env", "-i", "PYTHONDONTWRITEBYTECODE=1"]
    return ["chroot", str(root), *environment, "/usr/bin/python3", "-c", PROGRAM]


def start_application(root: Path) -> float:
    """Run the program from the file tree `root` until its first line of output; returns the seconds."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command(root),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.monotonic() - begin
    _, errors = process.communicate()
    if EXPECTED not in line or process.returncode:
        raise RuntimeError(f"the application failed: {line!r} {errors}")
    return seconds
