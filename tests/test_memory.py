"""Memory of the builder: bounded by its buffers for a layer of any length, and linear and small in the number of files.

Each measurement is a process of its own, whose peak the kernel keeps; both sizes of a pair are measured, so that what
the interpreter and the machine take cancels out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_PROLOGUE = """
import sys
from tests.support.endless import Counted, Files
from erofs_builder.layer import build_layer
from loader.convert.assemble import assemble
from loader.convert.convert import lean_memory

lean_memory()
"""
_LAYER = "build_layer(Files(count={count}, size={size}), Counted())"
_IMAGE = "assemble([build_layer(Files(count={count}, size={size}), Counted())], None, consume=True)"
# Not ru_maxrss: that begins with what the parent had when it forked.
_EPILOGUE = "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"


def peak(body: str, **numbers: int) -> int:
    """Peak memory in bytes of a process that runs `body`."""
    program = _PROLOGUE + body.format(**numbers) + _EPILOGUE
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=True, capture_output=True, timeout=280
    )
    return int(done.stdout) << 10


def test_a_long_layer_takes_no_more_memory_than_a_short_one() -> None:
    short, long = (peak(_LAYER, count=count, size=3 << 20) for count in (60, 600))  # 0.2 and 1.9 GB
    assert long < short + (48 << 20)
    assert long < 256 << 20


def test_one_file_of_a_gigabyte_takes_no_more_memory_than_a_small_one() -> None:
    short, long = (peak(_LAYER, count=1, size=size) for size in (100 << 20, 1 << 30))
    assert long < short + (48 << 20)


def test_a_file_takes_about_a_kilobyte() -> None:
    few, many = (peak(_IMAGE, count=count, size=300) for count in (20_000, 120_000))
    assert (many - few) / 100_000 < 1200
