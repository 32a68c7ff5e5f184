"""What was measured, as a JSON document that grows row by row: a run that is cut short loses nothing that it has.

    {"machine": "…", "limits": {"sha256, one processor": 1900, …},
     "rows": [{"number", "what", …, "measured": "2026-01-31T12:00Z", "runs": 5, "seconds": 12.3}]}

Rows are those of measure.Row; measuring a number again replaces its rows.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import Row


@dataclass
class Measured:
    """A row, and when and how it came to be."""

    row: Row
    measured: str
    runs: int
    seconds: float  # of its whole group


@dataclass
class Results:
    """All rows so far, in the order of their numbers."""

    machine: str
    rows: list[Measured] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)  # MB/s

    def put(self, numbers: set[str], rows: list[Row], runs: int, seconds: float) -> None:
        """Replace what is known of `numbers`."""
        moment = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        kept = [known for known in self.rows if known.row.number not in numbers]
        self.rows = kept + [Measured(row, moment, runs, round(seconds, 1)) for row in rows]
        self.rows.sort(key=lambda known: _place(known.row.number))

    def document(self) -> dict[str, Any]:
        """What the file holds."""
        rows = [
            asdict(known.row) | {"measured": known.measured, "runs": known.runs, "seconds": known.seconds}
            for known in self.rows
        ]
        return {"machine": self.machine, "limits": self.limits, "rows": rows}

    def save(self, path: Path) -> None:
        """Replace the file."""
        temporary = path.with_name(path.name + ".new")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n")
        temporary.replace(path)


def load(path: Path) -> Results:
    """What an earlier run saved; empty without a file."""
    if not path.exists():
        return Results(machine())
    document = json.loads(path.read_text())
    rows = []
    for entry in document["rows"]:
        about = {name: entry.pop(name) for name in ("measured", "runs", "seconds")}
        rows.append(Measured(Row(**entry), **about))
    return Results(document["machine"], rows, document["limits"])


def _place(number: str) -> int:
    """R1 to R15 in this order, then what has no number."""
    return int(number[1:]) if number[1:].isdecimal() else 1000


def machine() -> str:
    """What this is measured on."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    processor = " / ".join(sorted(names)) or platform.machine()
    return f"{os.cpu_count()} × {processor}, {size:.0f} GiB, Linux {platform.release()}"
