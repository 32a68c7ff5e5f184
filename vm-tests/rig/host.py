"""The host's side of a run: one folder, one network of its own; images are made once for all cells and lanes.

A lane plays one scenario after the other, with a registry that it can stop; the lanes' registries share their store.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rig import disk, machine
from rig.registry import PORT, Registry
from rig.table import HERE, Image

REPOSITORY = HERE.parent
T = TypeVar("T")
sys.path.append(str(REPOSITORY))  # for bench.link


@dataclass(frozen=True)
class Cell:
    """One place of the matrix."""

    image: Image
    plane: str
    form: str

    def __str__(self) -> str:
        return f"{self.image.kernel.name} {self.plane}/{self.form}"

    @property
    def native(self) -> bool:
        """Whether it is this machine itself."""
        return self.image.kernel.origin == "host"


@dataclass
class Result:
    """What a scenario did in a cell: `outcome` is passed, failed or lost."""

    kernel: str
    release: str
    plane: str
    form: str
    scenario: str
    outcome: str
    seconds: float
    commit: str = ""
    message: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As the report keeps it."""
        return asdict(self)


class Shared:
    """What the lanes of a run have together: its folder, and what was made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self._made: dict[str, Any] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def once(self, name: str, make: Callable[[Path], Any]) -> Any:
        """`make(folder)` the first time in this run; later its result again."""
        with self._locks[name]:
            if name not in self._made:
                folder = self.folder / "made" / name
                folder.mkdir(parents=True)
                self._made[name] = make(folder)
            return self._made[name]


class Host:
    """What a scenario's `host` function gets: the lane's registry, a place for handlers, images made once."""

    def __init__(self, shared: Shared, lane: int = 0) -> None:
        self.folder = shared.folder
        self.once = shared.once
        self.handlers: machine.Handlers = {}
        self.cell: Cell | None = None
        self._shared, self._lane = shared, lane
        self._registry: Registry | None = None
        self._scenario = contextlib.ExitStack()

    @property
    def registry(self) -> Registry:
        """The lane's registry, started when it is first asked for."""
        if self._registry is None:
            self._registry = Registry(self.folder / f"registry-{self._lane}", self._shared.store, PORT + self._lane)
            self._registry.start()
        return self._registry

    def seen(self, address: str) -> str:
        """What a guest of this cell has to say for an address on our loopback."""
        native = self.cell is not None and self.cell.native
        return address if native else address.replace("127.0.0.1", machine.OUR_ADDRESS)

    def keep(self, resource: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context until the scenario ends."""
        return self._scenario.enter_context(resource)

    def end_scenario(self) -> None:
        """Leave what `keep` entered; a registry that the scenario left stopped runs again."""
        self._scenario.close()
        if self._registry:
            self._registry.start()

    def program(self, module: str, *arguments: str) -> str:
        """Run one of the project's commands on the host (`loader.cli.builder`, …) and give its standard output."""
        code = f"import sys; from {module} import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Stop what was started."""
        if self._registry:
            self._registry.stop()


def scenarios() -> dict[str, ModuleType]:
    """Every file of scenarios/, by name."""
    names = sorted(path.stem for path in (HERE / "scenarios").glob("[a-z]*.py"))
    return {name: importlib.import_module(f"scenarios.{name}") for name in names}


def fits(scenario: ModuleType, cell: Cell) -> bool:
    """Whether the scenario says that it is for such a cell (`PLANES`, by default both, `FORMS` and `NATIVE`)."""
    if cell.native and not getattr(scenario, "NATIVE", True):
        return False
    planes = getattr(scenario, "PLANES", ("cachefiles", "fanotify"))
    forms = getattr(scenario, "FORMS", (cell.form,))
    return cell.plane in planes and cell.form in forms


def play(host: Host, scenario: ModuleType, cell: Cell) -> Result:
    """Run a scenario's boots in a cell, one after the other on one disk, until one does not pass."""
    name = scenario.__name__.rsplit(".", 1)[1]
    result = Result(cell.image.kernel.name, "", cell.plane, cell.form, name, "passed", 0.0, commit())
    folder = host.folder / f"{cell.image.kernel.name}-{cell.plane}-{cell.form}-{name}"
    folder.mkdir()
    started = time.monotonic()
    host.cell, host.handlers = cell, {}
    try:
        task = scenario.host(host) if hasattr(scenario, "host") else {}
        task |= {"scenario": name, "plane": cell.plane, "form": cell.form}
        task |= {"systemd": getattr(scenario, "SYSTEMD", False)}
        scratch = disk.make(folder / "disk", getattr(scenario, "DISK", disk.SIZE))
        for function in scenario.BOOTS:
            end = machine.run(_boot(host, cell, folder, scratch, {**task, "function": function}, scenario))
            _note(result, function, end)
            if not end["ok"]:
                result.outcome, result.message = "failed", f"{function}: {end['error']}"
                (folder / "trace").write_text(end["trace"])
                break
        scratch.unlink()
    except machine.LostVM as error:
        result.outcome, result.message = "lost", str(error)
    except Exception as error:  # the host's own part
        result.outcome, result.message = "failed", f"host: {type(error).__name__}: {error}"
    finally:
        host.end_scenario()
    result.seconds = round(time.monotonic() - started, 1)
    return result


def _boot(
    host: Host, cell: Cell, folder: Path, scratch: Path, task: dict[str, Any], scenario: ModuleType
) -> machine.Boot:
    limit = 2.0 * getattr(scenario, "LIMIT", 120)  # it only ends hangs, and a host may be busy
    label = f"{cell} {task['scenario']}"
    last = task["function"] == scenario.BOOTS[-1]
    return machine.Boot(cell.image, folder / task["function"], scratch, task, host.handlers, limit, label, last)


def _note(result: Result, function: str, end: dict[str, Any]) -> None:
    result.release = end["kernel"]
    result.steps += [{"boot": function, **step} for step in end["steps"]]
    result.facts |= end["facts"]


def commit() -> str:
    """The checkout's commit, with `-dirty` if files differ from it, but for the page that a run writes."""
    git = ["git", "-C", str(REPOSITORY)]
    describe = [*git, "describe", "--always", "--abbrev=10", "--exclude=*"]
    name = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/kernels.md"]
    dirty = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
    return f"{name}-dirty" if dirty else name


def title(scenario: ModuleType) -> str:
    """The first line of a scenario's docstring."""
    return (inspect.getdoc(scenario) or "").splitlines()[0]
