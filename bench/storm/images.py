"""The images of a storm: directory trees that readers compare with, published in a real registry."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

LARGE, SMALL = 10, 60
TOOL = "bin/tool"
# A static program whose output depends on every page of it.
_PROGRAM = r"""
#include <stdio.h>
extern const unsigned char data[], data_end[];
__asm__(".section .rodata\n.globl data, data_end\ndata: .incbin \"%s\"\ndata_end:\n.text\n");
int main(void)
{
	unsigned long sum = 5381;
	for (const unsigned char *p = data; p < data_end; p++)
		sum = sum * 33 + *p;
	return printf("%%lx\n", sum) < 0;
}
"""


def make_tree(root: Path, seed: int) -> None:
    """Files that do and that do not compress, small and large, and a program."""
    rng = random.Random(seed)
    for name, count, low, high in (("large", LARGE, 300_000, 1_500_000), ("small", SMALL, 1, 20_000)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            data = rng.randbytes(rng.randrange(low, high))
            if number % 2:
                data = (data[: len(data) // 3].hex().encode() * 2)[: len(data)]
            (root / name / str(number)).write_bytes(data)
    (root / "bin").mkdir()
    _compile(root / TOOL, rng.randbytes(400_000))


def _compile(program: Path, data: bytes) -> None:
    payload = program.with_suffix(".data")
    payload.write_bytes(data)
    command = ["gcc", "-O1", "-static", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=_PROGRAM % payload, text=True, check=True)
    payload.unlink()


def publish(tree: Path, reference: str) -> None:
    """Convert a tree into an artifact in a registry."""
    code = "from loader.cli.builder import main; main()"
    command = [sys.executable, "-c", code, "convert", f"rootfs:{tree}", reference, "--insecure"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[2])
