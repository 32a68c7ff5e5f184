"""The bench: python -m bench.run [--rows R1,R5] [--runs 5] [--json]

Each figure stands beside a peer's, measured in the same minutes on this machine. Cold means dropped page caches and
an empty cache directory. Bytes on the wire are what crosses the link in both directions, HTTP headers included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict

from bench import building, starting, updating
from bench.measure import HEADER, Row
from bench.table import render

GROUPS: dict[tuple[str, ...], Callable[[int], list[Row]]] = {
    ("R1", "R2", "R3"): starting.rows,
    ("R5", "R6"): building.rows,
    ("R7",): updating.rows,
}


def machine() -> str:
    """What this was measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} processors, {memory:.0f} GiB, Linux {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="measure side by side with other programs")
    parser.add_argument("--rows", default="", help="only these, with commas between them: R1,R5")
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each measurement (5)")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("the benches mount file systems and drop caches: run them as root")
    wanted = set(options.rows.split(",")) if options.rows else {name for names in GROUPS for name in names}
    rows = [
        row
        for names, measure in GROUPS.items()
        if wanted.intersection(names)
        for row in measure(options.runs)
        if row.number in wanted
    ]
    if options.json:
        print(json.dumps({"machine": machine(), "runs": options.runs, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{machine()}; medians of {options.runs} paired runs\n")
        print(render(HEADER, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
