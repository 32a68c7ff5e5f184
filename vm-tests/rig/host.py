"""The host's side of a run: one folder, one network of its own; images are made once for all cells and lanes.

A lane plays one scenario after the other, with a registry that it can stop; the lanes' registries share their store.
Scenarios that need a single ordinary boot share one, each with its own disk, result and limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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
    cpu_seconds: float = 0.0
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
    """Whether the scenario says that it is for such a cell (`PLANES`, by default both; `FORMS`; `NATIVE`; `ONCE`)."""
    if cell.native and not getattr(scenario, "NATIVE", True):
        return False
    first = (cell.plane, cell.form) == cell.image.kernel.cells[0]
    if getattr(scenario, "ONCE", False) and not first and not cell.native:
        return False
    planes = getattr(scenario, "PLANES", ("cachefiles", "fanotify"))
    forms = getattr(scenario, "FORMS", (cell.form,))
    return cell.plane in planes and cell.form in forms


def shares_a_boot(scenario: ModuleType, cell: Cell) -> bool:
    """Whether it can be played in one boot with others: it needs a single ordinary one."""
    return len(scenario.BOOTS) == 1 and not getattr(scenario, "SYSTEMD", False) and not cell.native


def play(host: Host, scenario: ModuleType, cell: Cell) -> Result:
    """Run a scenario's boots in a cell, one after the other on one disk, until one does not pass."""
    scratch = _scratch(host, scenario, cell)
    with _playing(host, scenario, cell) as result:
        task = _task(host, scenario, cell)
        for function in scenario.BOOTS:
            systemd, product = getattr(scenario, "SYSTEMD", False), getattr(scenario, "PRODUCT", True)
            boot = machine.Boot(cell.image, scratch.parent / function, (scratch,), systemd, product)
            with machine.Machine(boot) as guest:
                guest.await_ready()
                _part(host, scenario, result, guest, {**task, "function": function}, scratch)
                if result.outcome == "passed" and function != scenario.BOOTS[-1]:
                    guest.power_off()
                result.cpu_seconds = round(result.cpu_seconds + guest.cpu_seconds, 1)
            if result.outcome != "passed":
                break
    scratch.unlink()
    return result


def play_together(host: Host, chosen: list[ModuleType], cell: Cell) -> Iterator[Result]:
    """The results of scenarios that share a boot. After one that did not pass the rest is played in another boot."""
    disks = [_scratch(host, scenario, cell) for scenario in chosen]
    left = list(zip(chosen, disks, strict=True))
    while left:
        product = any(getattr(scenario, "PRODUCT", True) for scenario, _ in left)
        boot = machine.Boot(
            cell.image, left[0][1].parent / "boot", tuple(scratch for _, scratch in left), product=product
        )
        with contextlib.ExitStack() as stack:
            passed, guest, used = True, None, 0.0
            while left and passed:
                scenario, scratch = left[0]
                with _playing(host, scenario, cell) as result:
                    if guest is None:  # a machine that does not boot is the first one's loss
                        guest = stack.enter_context(machine.Machine(boot))
                        guest.await_ready()
                    task = _task(host, scenario, cell) | {"function": scenario.BOOTS[0]}
                    _part(host, scenario, result, guest, task, scratch)
                used, result.cpu_seconds = _since(guest, used)
                passed = result.outcome == "passed"
                left.pop(0)
                yield result
                passed = passed and (not left or _clean(guest, result))
        for scratch in boot.disks[: len(boot.disks) - len(left)]:
            scratch.unlink()


def _since(guest: machine.Machine | None, used: float) -> tuple[float, float]:
    """The machine's processor time, and what of it is new."""
    now = guest.cpu_seconds if guest else used
    return now, round(now - used, 1)


def _clean(guest: machine.Machine, result: Result) -> bool:
    """Whether nothing is left of a scenario that passed: else the next one gets another machine."""
    try:
        guest.await_ready()
    except machine.LostVM as error:
        print(f"    after {result.scenario} another machine is needed: {error}", file=sys.stderr, flush=True)
        return False
    return True


@contextlib.contextmanager
def _playing(host: Host, scenario: ModuleType, cell: Cell) -> Iterator[Result]:
    """The result of a scenario; what the body raises is an outcome."""
    result = Result(cell.image.kernel.name, "", cell.plane, cell.form, _name(scenario), "passed", 0.0, commit=commit())
    started = time.monotonic()
    try:
        yield result
    except machine.LostVM as error:
        result.outcome, result.message = "lost", str(error)
    except Exception as error:  # the host's own part
        result.outcome, result.message = "failed", f"host: {type(error).__name__}: {error}"
    finally:
        host.end_scenario()
        result.seconds = round(time.monotonic() - started, 1)


def _task(host: Host, scenario: ModuleType, cell: Cell) -> dict[str, Any]:
    """The host's part of a scenario: what its guest functions get."""
    host.cell, host.handlers = cell, {}
    task = scenario.host(host) if hasattr(scenario, "host") else {}
    return {**task, "scenario": _name(scenario), "plane": cell.plane, "form": cell.form}


def _part(
    host: Host, scenario: ModuleType, result: Result, guest: machine.Machine, task: dict[str, Any], scratch: Path
) -> None:
    """Play one function of a scenario, and note what it said."""
    limit = 2.0 * getattr(scenario, "LIMIT", 120)  # it only ends hangs, and a host may be busy
    label = f"{result.kernel} {result.plane}/{result.form} {result.scenario}"
    end = guest.play(machine.Part(task, scratch, host.handlers, limit, label))
    result.release = end["kernel"]
    result.steps += [{"boot": task["function"], **step} for step in end["steps"]]
    result.facts |= end["facts"]
    if not end["ok"]:
        result.outcome, result.message = "failed", f"{task['function']}: {end['error']}"
        (scratch.parent / "trace").write_text(end["trace"])


def _scratch(host: Host, scenario: ModuleType, cell: Cell) -> Path:
    """A new disk for a scenario, in a folder of its own."""
    folder = host.folder / f"{cell.image.kernel.name}-{cell.plane}-{cell.form}-{_name(scenario)}"
    folder.mkdir()
    return disk.make(folder / "disk", getattr(scenario, "DISK", disk.SIZE))


def _name(scenario: ModuleType) -> str:
    return scenario.__name__.rsplit(".", 1)[1]


@functools.cache
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
