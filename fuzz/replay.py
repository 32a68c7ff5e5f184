"""Replay inputs without a fuzzer: `python -m fuzz.replay [--megabytes N] TARGET FILE…`, each with a time limit.

A find ends the program with its traceback (a hang: with that of the place where it hung), behind the input's name.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import resource
import sys
from pathlib import Path

from fuzz.targets import TARGETS

SECONDS = 10


def main() -> None:
    """Run the target on every input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, help="address space that may be used")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="*", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    target = TARGETS[arguments.target]
    target(b"")  # whatever is made once
    if arguments.megabytes:
        resource.setrlimit(resource.RLIMIT_AS, (arguments.megabytes << 20,) * 2)
    for file in arguments.file:
        print(file, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.stdout)
        target(file.read_bytes())
        faulthandler.cancel_dump_traceback_later()
    print(f"{len(arguments.file)} inputs, no find")


if __name__ == "__main__":
    main()
