"""The three kinds of code stay apart: kernel ABI and format packages import nothing of ours but themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL_ABI = {"cachefiles", "confine", "fanotify", "mounts"}
FORMAT = {"erofs_builder"}
OURS = KERNEL_ABI | FORMAT | {"loader"}
NETWORK = {"http", "requests", "socket", "ssl", "urllib.request", "urllib3"}


def imports(path: Path) -> set[str]:
    """The modules that a module imports, by full name, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def uses_network(names: set[str]) -> bool:
    return any(name == banned or name.startswith(banned + ".") for name in names for banned in NETWORK)


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", sorted(KERNEL_ABI | FORMAT))
def test_packages_apart(package: str) -> None:
    for path in modules(package):
        names = imports(path)
        assert packages(names) & OURS <= {package}, path
        assert not uses_network(names), path


def test_the_keeper_is_small() -> None:
    """Standard library, the ABI packages and the keeper itself: nothing that can pull a network client in."""
    for path in modules("loader/keeper"):
        names = imports(path)
        ours = {name for name in names if name.partition(".")[0] in OURS - KERNEL_ABI}
        assert all(name.startswith("loader.keeper") or name == "loader.errors" for name in ours), path
        assert not uses_network(names - {"socket"}), path
