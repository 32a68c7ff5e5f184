"""The kernel matrix from the test suite: the rig's own honesty, then some scenarios on one kernel of each plane.

The whole matrix is `vm-tests/run`; what it saw last is docs/kernels.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VM_TESTS = Path(__file__).resolve().parent.parent / "vm-tests"
sys.path.insert(0, str(VM_TESTS))

from rig import build, disk, machine, table  # noqa: E402

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1500)]

# One kernel for each plane; 6.12 has both forms of cachefiles.
CHOSEN = {
    "debian-6.12": ("bare_cachefiles", "by_hand", "kills"),
    "trixie-backports": ("mount", "kills", "probe"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that the guest sees too (it has a /tmp of its own)."""
    with tempfile.TemporaryDirectory(prefix="erofs-vm-", dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def image() -> table.Image:
    """Some kernel that boots."""
    return build.obtain(table.load()["trixie-backports"])


def boot(image: table.Image, folder: Path, function: str, limit: float = 60) -> dict[str, Any]:
    """One boot of the rig's own scenario."""
    task = {"scenario": "_rig", "function": function}
    handlers: machine.Handlers = {"add": lambda one, other: one + other}
    return machine.run(machine.Boot(image, folder / "boot", disk.make(folder / "disk"), task, handlers, limit))


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


@pytest.mark.parametrize(
    ("function", "limit", "why"),
    [("panics", 60, "the VM ended"), ("hangs", 15, "out of time"), ("forges", 60, "nonce")],
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


@pytest.mark.parametrize("kernel", CHOSEN)
def test_scenarios_pass_in_every_cell_of_a_kernel(kernel: str, folder: Path) -> None:
    report = folder / "report.json"
    words = [word for name in CHOSEN[kernel] for word in ("--scenario", name)]
    command = [sys.executable, str(VM_TESTS / "run"), "--kernel", kernel, *words, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = json.loads(report.read_text()) if report.exists() else []
    bad = [result for result in results if result["outcome"] != "passed"]
    assert done.returncode == 0, "\n".join([*map(str, bad), done.stderr])
    assert len(results) == 2 * len(CHOSEN[kernel])
