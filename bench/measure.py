"""Runs, medians, and the rows of the result."""

from __future__ import annotations

import shlex
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
    note: str = ""  # why it is behind and what comes next
    samples: dict[str, list[float]] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)  # the peers' figures, in the unit of `value`
    limit: str = ""  # how far it is from what the machine or the link can do at all
    commands: list[str] = field(default_factory=list)  # what was run, the peers' above all
    failure: str = ""  # why there is no figure

    @property
    def met(self) -> bool:
        return not self.failure and (self.value >= self.goal if self.larger else self.value <= self.goal)

    @property
    def figure(self) -> str:
        """The value with its unit."""
        return with_unit(self.value, self.unit)

    @property
    def verdict(self) -> str:
        """In one word how the figure stands to its goal; a goal of 0 is none."""
        return "failed" if self.failure else "-" if not self.goal else "yes" if self.met else "behind"

    def cells(self) -> list[str]:
        """What a table shows."""
        sign = "≥" if self.larger else "≤"
        return [
            f"{self.number} {self.what}",
            self.ours,
            self.peer,
            "-" if self.failure else self.figure,
            f"{sign} {self.goal:g}{self.unit}" if self.goal else "-",
            self.verdict,
        ]


HEADER = ["", "ours", "peer", "figure", "goal", "met"]


def with_unit(value: float, unit: str) -> str:
    """A value in three digits or so."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}{unit}"


def failed(number: str, error: BaseException) -> Row:
    """The row of what could not be measured."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return Row(number, "not measured", "-", text, 0.0, 0.0, larger=True, failure=text)


def ratios(numerators: Sample, denominators: Sample) -> Sample:
    """The quotient of each pair of runs."""
    return Sample([one / other for one, other in zip(numerators.values, denominators.values, strict=True)])


def shown(command: Sequence[str | Path], *directories: Path) -> str:
    """A command as a reader can type it: programs without their place, `$W` for the directories of the bench."""
    words = [Path(command[0]).name, *map(str, command[1:])]
    for directory in sorted(directories, key=lambda path: -len(str(path))):
        words = [word.replace(str(directory), "$W") for word in words]
    return " ".join(word if word.startswith("$W") or "$W" in word else shlex.quote(word) for word in words)


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
