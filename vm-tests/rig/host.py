"""The host's side of a run: one folder, one network of its own; images are made once for all cells and lanes.

A lane plays one scenario after the other, with a registry that it can stop; the lanes' registries share their store.
The first boots of a cell's scenarios are one, unless systemd is in it; each has its own disk, result and limit.
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
from rig.table import HERE, Image, Kernel

REPOSITORY = HERE.parent
T = TypeVar("T")
Place = tuple[str, str, str]  # a kernel's name, a plane, a form
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


def fits(scenario: ModuleType, kernel: Kernel, plane: str, form: str) -> bool:
    """Whether the scenario says that it is for such a cell (`PLANES`, by default both; `FORMS`; `NATIVE`)."""
    if kernel.origin == "host" and not getattr(scenario, "NATIVE", True):
        return False
    planes = getattr(scenario, "PLANES", ("cachefiles", "fanotify"))
    return plane in planes and form in getattr(scenario, "FORMS", (form,))


def place(scenario: ModuleType, kernel: Kernel, plane: str, form: str, kernels: dict[str, Kernel]) -> Place:
    """Where the scenario is played for that cell: there, unless once for each kernel, or for each plane, is enough.

    With `ONCE = "kernel"` that is the kernel's first cell, with `ONCE = "plane"` the first of the last kernel that has
    the plane. What the host's own kernel does is always played.
    """
    once = getattr(scenario, "ONCE", None)
    if once is None or kernel.origin == "host":
        return kernel.name, plane, form
    if once == "kernel":
        return kernel.name, *kernel.cells[0]
    having = [other for other in kernels.values() if other.origin != "host" and other.cell_of(plane)]
    return having[-1].name, *(having[-1].cell_of(plane) or (plane, form))


def shares_a_boot(scenario: ModuleType, cell: Cell) -> bool:
    """Whether its first boot can be one with others: it is an ordinary one."""
    return not getattr(scenario, "SYSTEMD", False) and not cell.native


def play(host: Host, scenario: ModuleType, cell: Cell) -> Result:
    """Run a scenario's boots in a cell, one after the other on one disk, until one does not pass."""
    result = _result(scenario, cell)
    _play_boots(host, scenario, cell, result, _scratch(host, scenario, cell), scenario.BOOTS)
    return result


def _play_boots(
    host: Host, scenario: ModuleType, cell: Cell, result: Result, scratch: Path, functions: tuple[str, ...]
) -> None:
    """Each of the functions in a boot of its own."""
    with _playing(host, result):
        task = _task(host, scenario, cell)
        for function in functions:
            systemd, product = getattr(scenario, "SYSTEMD", False), getattr(scenario, "PRODUCT", True)
            boot = machine.Boot(cell.image, scratch.parent / function, (scratch,), systemd, product)
            with machine.Machine(boot) as guest:
                guest.await_ready()
                _part(host, scenario, result, guest, {**task, "function": function}, scratch)
                if result.outcome == "passed" and function != functions[-1] and guest.running:
                    guest.await_ready()
                    guest.power_off()
                result.cpu_seconds = round(result.cpu_seconds + guest.cpu_seconds, 1)
            if result.outcome != "passed":
                break
    scratch.unlink()


def play_together(host: Host, chosen: list[ModuleType], cell: Cell) -> Iterator[Result]:
    """The results of scenarios whose first boot is one. After one that did not pass the rest is played in another boot.

    Those that have more boots get them afterwards, each its own.
    """
    left = [(scenario, _scratch(host, scenario, cell)) for scenario in chosen]
    while left:
        reboots: list[tuple[ModuleType, Result, Path]] = []
        product = any(getattr(scenario, "PRODUCT", True) for scenario, _ in left)
        disks = tuple(scratch for _, scratch in left)
        boot = machine.Boot(cell.image, disks[0].parent / "boot", disks, product=product)
        with contextlib.ExitStack() as stack:
            passed, guest, used = True, None, 0.0
            while left and passed:
                scenario, scratch = left.pop(0)
                result = _result(scenario, cell)
                with _playing(host, result):
                    if guest is None:  # a machine that does not boot is the first one's loss
                        guest = stack.enter_context(machine.Machine(boot))
                        guest.await_ready()
                    task = _task(host, scenario, cell) | {"function": scenario.BOOTS[0]}
                    _part(host, scenario, result, guest, task, scratch)
                used, result.cpu_seconds = _since(guest, used)
                passed = result.outcome == "passed"
                if passed and scenario.BOOTS[1:]:
                    reboots.append((scenario, result, scratch))
                else:
                    scratch.unlink()
                    yield result
                passed = passed and guest is not None and (not (left or reboots) or _clean(guest, result))
            if guest and passed and reboots:
                guest.power_off()
        for scenario, result, scratch in reboots:
            _play_boots(host, scenario, cell, result, scratch, scenario.BOOTS[1:])
            yield result


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


def _result(scenario: ModuleType, cell: Cell) -> Result:
    return Result(cell.image.kernel.name, "", cell.plane, cell.form, _name(scenario), "passed", 0.0, commit=commit())


@contextlib.contextmanager
def _playing(host: Host, result: Result) -> Iterator[None]:
    """While a scenario is played: what the body raises is its outcome."""
    started = time.monotonic()
    try:
        yield
    except machine.LostVM as error:
        result.outcome, result.message = "lost", str(error)
    except Exception as error:  # the host's own part
        result.outcome, result.message = "failed", f"host: {type(error).__name__}: {error}"
    finally:
        host.end_scenario()
        result.seconds = round(result.seconds + time.monotonic() - started, 1)


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
