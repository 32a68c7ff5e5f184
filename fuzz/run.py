"""The long run: every target under its fuzzer for a while, then what it came to.

    python -m fuzz.run [--seconds N] [--jobs N] [TARGET…]

`N` seconds are spent on a target (twice that where targets.py says so). Corpora grow in ~/.cache/erofs-ondemand/fuzz;
inputs that are finds lie there too, in finds/. The C has a fuzzer of its own (c/hot_fuzz.c), under AddressSanitizer and
UndefinedBehaviorSanitizer; it needs clang. Exit status 1: there were finds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fuzz import seeds
from fuzz.targets import TARGETS

HERE = Path(__file__).parent
STATE = Path.home() / ".cache/erofs-ondemand/fuzz"
C_TARGET = "c"
C_FOLDERS = (Path("erofs_builder/csrc"), Path("loader/csrc"))
_DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)|Done (\d+) runs")
_PROGRESS = re.compile(r"^#(\d+)\s", re.MULTILINE)
_LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-reload=0")


class Result(NamedTuple):
    """What became of one target."""

    target: str
    inputs: int
    seconds: float
    find: str  # empty, or the last lines that the fuzzer said


def build_c(directory: Path) -> Path:
    """The fuzzer of the C loops."""
    clang = next((name for name in ("clang", "clang-19", "clang-16", "clang-14") if shutil.which(name)), None)
    if clang is None:
        raise SystemExit("the C is fuzzed with clang: apt-get install clang-19 libclang-rt-19-dev")
    program = directory / "hot_fuzz"
    flags = ["-g", "-O1", "-fno-sanitize-recover=all", "-fsanitize=fuzzer,address,undefined"]
    flags += [f"-I{folder}" for folder in C_FOLDERS]
    sources = [str(file) for folder in C_FOLDERS for file in folder.glob("*.c")]
    subprocess.run([clang, *flags, str(HERE / "c/hot_fuzz.c"), *sources, "-lzstd", "-o", program], check=True)
    return program


def fuzz(target: str, seconds: int) -> Result:
    """One target, to its end or first find."""
    corpus = STATE / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    if target == C_TARGET:
        command = [str(build_c(STATE)), "-max_len=4096"]
    else:
        command = [sys.executable, "-m", "fuzz.one", target]
    finds = STATE / "finds"
    finds.mkdir(exist_ok=True)
    options = (*_LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={finds}/{target}-")
    started = time.monotonic()
    run = subprocess.run([*command, *options, str(corpus)], capture_output=True, text=True, errors="replace")
    counts = [int(first or second) for first, second in _DONE.findall(run.stderr)]
    inputs = max(counts or [int(count) for count in _PROGRESS.findall(run.stderr)] or [0])
    find = "" if run.returncode == 0 else (run.stdout + run.stderr)[-6000:]
    return Result(target, inputs, time.monotonic() - started, find)


def main() -> None:
    """Fuzz, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("target", nargs="*", metavar="TARGET", default=[])
    arguments = parser.parse_args()
    STATE.mkdir(parents=True, exist_ok=True)
    seeds.write(STATE / "corpus")
    chosen = arguments.target or [*TARGETS, C_TARGET]
    shares = {name: TARGETS[name].share if name in TARGETS else 1 for name in chosen}
    found = False
    total = 0
    started = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(lambda name: fuzz(name, arguments.seconds * shares[name]), chosen):
            print(
                f"{result.target:20}{result.inputs:14,}{result.seconds:9.0f} s  {'FIND' if result.find else 'ok'}",
                flush=True,
            )
            if result.find:
                print(result.find)
            found |= bool(result.find)
            total += result.inputs
    print(f"{'total':20}{total:14,}{time.monotonic() - started:9.0f} s")
    sys.exit(found)


if __name__ == "__main__":
    main()
