"""Runs, medians, and the rows of the result."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sample:
    """Values of one quantity over the runs, in the order of the runs."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, unit: str, digits: int = 1) -> str:
        """The median and, of several runs, the smallest and largest value."""
        middle = f"{self.median:.{digits}f} {unit}"
        if len(self.values) < 2:
            return middle
        return f"{middle} ({min(self.values):.{digits}f} to {max(self.values):.{digits}f})"


@dataclass
class Row:
    """A line of the result: a figure of ours, its peer's, and how the goal compares.

    `value` and `goal` have the same unit; `larger` says which side of the goal is good.
    """

    number: str
    what: str
    ours: str
    peer: str
    value: float
    goal: float
    larger: bool
    unit: str = ""
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.larger else self.value <= self.goal

    def cells(self) -> list[str]:
        """What a table shows."""
        sign = "≥" if self.larger else "≤"
        return [
            f"{self.number} {self.what}",
            self.ours,
            self.peer,
            f"{self.value:.2f}{self.unit}",
            f"{sign} {self.goal:g}{self.unit}",
            "yes" if self.met else "behind",
        ]


HEADER = ["", "ours", "peer", "figure", "goal", "met"]


def paired(runs: int, **measurements: Callable[[], float]) -> dict[str, Sample]:
    """Run the measurements in turn, `runs` times, so that what else the machine does meets all alike."""
    samples = {name: Sample() for name in measurements}
    for _ in range(runs):
        for name, measure in measurements.items():
            samples[name].add(measure())
    return samples


def timed(command: Sequence[str | Path], stdin: Path | None = None, stdout: Path | None = None) -> float:
    """Run a command that must succeed; returns its wall-clock seconds."""
    with open(stdin or "/dev/null", "rb") as source, open(stdout or "/dev/null", "wb") as sink:
        begin = time.monotonic()
        done = subprocess.run(command, stdin=source, stdout=sink, stderr=subprocess.PIPE)
        seconds = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
    return seconds
