"""docs/reliability.md names a test for each fault: they exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reliability.md"


def rows() -> Iterator[tuple[str, str]]:
    """First and last cell of each row of the tables whose last column is called `test`."""
    wanted = False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            wanted = False
        elif cells[-1] == "test":
            wanted = True
        elif wanted and set(line) - set("|-"):
            yield cells[0], cells[-1]


def names() -> set[str]:
    """Test files and test functions."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(node.name)
    return found


def test_every_fault_has_a_test_that_exists() -> None:
    known, listed = names(), list(rows())
    assert len(listed) > 40
    for fault, tests in listed:
        named = re.findall(r"`([a-z0-9_]+)`", tests)
        assert named, f"no test for {fault!r}"
        assert set(named) <= known, f"{fault!r}: {set(named) - known}"


def test_every_table_of_faults_names_its_tests() -> None:
    for line in PAGE.read_text().splitlines():
        if line.startswith("| fault |"):
            assert line.endswith("| test |"), line
