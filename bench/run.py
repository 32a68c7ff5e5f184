"""The bench: python -m bench.run [--rows R1,R5] [--runs 5] [--json [FILE]] [--picture FILE.svg] [--report FILE.md]

Each figure stands beside a peer's, measured in the same minutes on this machine. Cold means dropped page caches and
an empty cache directory. Bytes on the wire are what crosses the link in both directions, HTTP headers included.

With --json FILE every group of rows is saved as soon as it is measured, beside what the file holds of other rows;
--saved measures nothing and shows the file. A group that fails, or takes longer than --patience, is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import building, complete, disk, growth, many, mounting, newer, reading, starting, updating, walking
from bench.limits import limits
from bench.measure import HEADER, Row, failed
from bench.picture import draw
from bench.report import notes, report
from bench.results import Results, load, machine
from bench.table import render

GROUPS: dict[tuple[str, ...], Callable[[int], list[Row]]] = {
    ("R1", "R2", "R3"): starting.rows,
    ("R5", "R6"): building.rows,
    ("R7",): updating.rows,
    ("growth",): growth.rows,
    ("R8", "R9"): reading.rows,
    ("R10",): complete.rows,
    ("R11",): many.rows,
    ("R12",): mounting.rows,
    ("R13",): disk.rows,
    ("R14",): walking.rows,
    ("R15",): newer.rows,
}
STDOUT = Path("-")


def main() -> None:
    options = _options()
    saved = options.json if options.json not in (None, STDOUT) else None
    results = load(saved) if saved is not None else Results(machine())
    if not options.saved:
        if os.geteuid():
            raise SystemExit("the benches mount file systems and drop caches: run them as root")
        results.machine, results.limits = machine(), limits()
        every = {name for names in GROUPS for name in names}
        _measure(set(options.rows.split(",")) if options.rows else every, options, results, saved)
    if options.json == STDOUT:
        print(json.dumps(results.document(), ensure_ascii=False))
    else:
        print(_text(results))
    if options.picture:
        options.picture.write_text(draw(results))
    if options.report:
        options.report.write_text(report(results, options.picture))
    sys.exit(any(known.row.failure for known in results.rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure side by side with other programs")
    parser.add_argument("--rows", default="", help="only these, with commas between them: R1,R5")
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each measurement (5)")
    parser.add_argument("--patience", type=int, default=1800, help="seconds for one group of rows (1800)")
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE",
                        help="save every sample in FILE, row by row, or print all at the end")  # fmt: skip
    parser.add_argument("--saved", action="store_true", help="measure nothing, show what is in the --json file")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the table as an SVG")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page docs/performance.md")
    options = parser.parse_args()
    if options.saved and options.json in (None, STDOUT):
        parser.error("--saved needs --json FILE")
    return options


def _measure(wanted: set[str], options: argparse.Namespace, results: Results, saved: Path | None) -> None:
    for names, measure in GROUPS.items():
        numbers = wanted.intersection(names)
        if not numbers:
            continue
        print(f"{', '.join(names)} …", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            with _at_most(options.patience):
                rows = [row for row in measure(options.runs) if row.number in numbers]
        except Exception as error:
            traceback.print_exc()
            rows = [failed(number, error) for number in sorted(numbers)]
        results.put(numbers, rows, options.runs, time.monotonic() - begin)
        if saved is not None:
            results.save(saved)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """TimeoutError in the middle of whatever is going on, so that what it had started is ended."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _text(results: Results) -> str:
    """Everything for a terminal."""
    runs = sorted({known.runs for known in results.rows})
    count = " or ".join(map(str, runs))
    table = render(HEADER, [known.row.cells() for known in results.rows])
    return f"{results.machine}; medians of {count} paired runs\n\n{table}\n\n{notes(results)}"


if __name__ == "__main__":
    main()
