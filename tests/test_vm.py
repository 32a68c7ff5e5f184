"""The kernel matrix from the test suite: the rig's own honesty, then some scenarios on each kernel.

The whole matrix is `vm-tests/run`; what it saw last is docs/kernels.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

VM_TESTS = Path(__file__).resolve().parent.parent / "vm-tests"
sys.path.insert(0, str(VM_TESTS))

from rig import build, disk, machine, table  # noqa: E402

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1500)]

# Each kernel, plane and form; of the scenarios those that say most about a kernel.
CHOSEN = (
    "debian-6.1:decoded:mount",
    "debian-6.12:encoded:kills",
    "debian-6.12:decoded:by_hand",
    "trixie-backports:encoded:probe",
    "trixie-backports:encoded:mount",
    "trixie-backports:decoded:mount",
    "trixie:none:probe",
    "host:encoded:mount",
    "host:decoded:kills",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that the guest sees too (it has a /tmp of its own)."""
    with tempfile.TemporaryDirectory(prefix="erofs-vm-", dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def image() -> table.Image:
    """Some kernel that boots."""
    return build.obtain(table.load()["debian-6.12"])


def boot(image: table.Image, folder: Path, function: str, limit: float = 60) -> dict[str, Any]:
    """One boot of the rig's own scenario."""
    scratch = disk.make(folder / "disk")
    with machine.Machine(machine.Boot(image, folder / "boot", (scratch,))) as guest:
        guest.await_ready()
        return guest.play(part(function, scratch, limit))


def part(function: str, scratch: Path, limit: float = 60) -> machine.Part:
    """A function of the rig's own scenario."""
    handlers: machine.Handlers = {"add": lambda one, other: one + other}
    return machine.Part({"scenario": "_rig", "function": function}, scratch, handlers, limit)


def test_a_pass_is_reported_with_its_steps_and_facts(image: table.Image, folder: Path) -> None:
    end = boot(image, folder, "passes")
    assert end["ok"]
    assert [step["name"] for step in end["steps"]] == ["ask"]
    assert end["facts"] == {"sum": 5}


def test_a_failure_is_a_failure_and_names_its_step(image: table.Image, folder: Path) -> None:
    end = boot(image, folder, "fails")
    assert not end["ok"]
    assert "as it should" in end["error"]
    assert [(step["name"], step["ok"]) for step in end["steps"]] == [("wrong", False)]


def test_nothing_of_a_part_is_left_for_the_next(image: table.Image, folder: Path) -> None:
    disks = disk.make(folder / "one"), disk.make(folder / "other")
    with machine.Machine(machine.Boot(image, folder / "boot", disks)) as guest:
        for function, scratch in (("leaves", disks[0]), ("finds_nothing", disks[1])):
            guest.await_ready()
            end = guest.play(part(function, scratch))
            assert end["ok"], end["error"]


@pytest.mark.parametrize(
    ("function", "limit", "why"),
    [("panics", 60, "the VM ended"), ("hangs", 10, "out of time"), ("forges", 60, "nonce")],
)
def test_no_answer_is_a_lost_vm_and_leaves_nothing(
    image: table.Image, folder: Path, function: str, limit: float, why: str
) -> None:
    with pytest.raises(machine.LostVM, match=why):
        boot(image, folder, function, limit)
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in listing


def test_the_host_cannot_be_written(image: table.Image, folder: Path) -> None:
    assert boot(image, folder, "writes")["ok"]


def test_chosen_scenarios_pass(folder: Path, record_property: Callable[[str, object], None]) -> None:
    """What ran is in the summary at the end of the session too."""
    path = folder / "report.json"
    picks = [word for pick in CHOSEN for word in ("--pick", pick)]
    command = [sys.executable, str(VM_TESTS / "run"), *picks, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = json.loads(path.read_text()) if path.exists() else []
    for one in results:
        place = f"{one['kernel']} ({one['release']}) {one['plane']}/{one['form']}"
        record_property("cell", f"{place}: {one['scenario']}: {one['outcome']} in {one['seconds']:.0f} s")
    bad = [result for result in results if result["outcome"] != "passed"]
    assert done.returncode == 0, "\n".join([*map(str, bad), done.stderr])
    assert len(results) == len(CHOSEN)
