"""The page docs/performance.md, made of what was measured."""

from __future__ import annotations

from pathlib import Path

from bench.measure import HEADER, Row
from bench.reasons import reason
from bench.results import Measured, Results
from bench.table import markdown

_INTRODUCTION = """\
# Performance

Made by `python -m bench.run --json FILE --report docs/performance.md --picture docs/performance.svg`; do not edit.
`make bench` measures the same on another machine.

Every figure stands beside those of other programs that did the same in the same minutes on the same machine, in turn.
Medians of the paired runs, in parentheses the smallest and the largest. A figure that is behind its goal is told below
with the reason.

What is counted:

- *Cold*: page caches dropped, an empty cache directory, a daemon that was started for this run.
- *Bytes on the wire*: what crosses the link in both directions, HTTP headers included; not the headers of TCP and IP.
- *The link* is a proxy with a rate and a round-trip time (`bench/link.py`), or loopback where none is named.
- *The image*: Debian 12 with python3, numpy, requests and a compiler, about 17,400 inodes, made from packages.
- *The application*: a Python program that imports numpy and requests; its time ends with its first line of output.
- *Peers* run without their prefetching of all in the background, which would take the link from a start; ours runs as
  it is installed. overlaybd is not among them: its devices need TCMU in the kernel.
"""


def report(results: Results, picture: Path | None) -> str:
    """The page in Markdown."""
    parts = [_INTRODUCTION, _measured_on(results)]
    if picture is not None:
        parts.append(f"![Each figure against its goal, with those of the peers]({picture.name})")
    parts += ["## The table", markdown(HEADER, [_cells(known.row) for known in results.rows])]
    for title, body in (
        ("## What is behind, and why", _behind(results.rows)),
        ("## How far from what is possible", _limits(results)),
        ("## The commands", _commands(results.rows)),
    ):
        if body:
            parts += [title, body]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def notes(results: Results) -> str:
    """What a terminal shows under its table: limits, reasons and commands."""
    lines = [_machine_limits(results)] if results.limits else []
    for known in results.rows:
        row = known.row
        lines += [f"{_name(row)}: {text}" for text in (row.limit, _why(row)) if text]
        lines += [f"{row.number} $ {command}" for command in row.commands]
    return "\n".join(dict.fromkeys(lines))


def _measured_on(results: Results) -> str:
    moments = sorted(known.measured for known in results.rows)
    runs = sorted({known.runs for known in results.rows})
    when = f"{moments[0]} to {moments[-1]}" if moments else "never"
    return f"Measured {when} on {results.machine}; {' or '.join(map(str, runs))} paired runs."


def _cells(row: Row) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row.cells()]


def _name(row: Row) -> str:
    return f"{row.number} {row.what}"


def _why(row: Row) -> str:
    if row.failure or row.verdict != "behind":
        return row.failure
    return row.note or reason(row) or "no reason is known"


def _behind(rows: list[Measured]) -> str:
    return "\n".join(f"- **{_name(known.row)}**: {_why(known.row)}" for known in rows if _why(known.row))


def _machine_limits(results: Results) -> str:
    speeds = "; ".join(f"{name} {speed:.0f}" for name, speed in results.limits.items())
    return f"This machine alone, in MB/s: {speeds}."


def _limits(results: Results) -> str:
    lines = [f"- {_name(known.row)}: {known.row.limit}" for known in results.rows if known.row.limit]
    return "\n".join([*([_machine_limits(results), ""] if results.limits else []), *lines])


def _commands(rows: list[Measured]) -> str:
    lines: list[str] = []
    for number in dict.fromkeys(known.row.number for known in rows):
        commands = [command for known in rows if known.row.number == number for command in known.row.commands]
        if commands:
            lines += [f"{number}:", "", "```sh", *dict.fromkeys(commands), "```", ""]
    return "\n".join(lines)
