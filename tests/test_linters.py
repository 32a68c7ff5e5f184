"""The linters as tests: one command tells whether a change is clean. A missing tool is an error where CI is set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["loader", "erofs_builder", "cachefiles", "confine", "fanotify", "mounts"]
TEXTS = [*PACKAGES, "tests", "bench", "fuzz", "vm-tests", "docs", "README.md"]


def _run(module: str, *arguments: str) -> None:
    if importlib.util.find_spec(module) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{module} is not installed")
        pytest.skip(f"{module} is not installed")
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    _run("ruff", "check", ".")


def test_format_is_ruffs() -> None:
    _run("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_types_of_the_packages() -> None:
    _run("mypy")


@pytest.mark.slow
def test_types_of_tests_and_benches() -> None:
    _run("mypy", "tests", "bench", "fuzz", "vm-tests/rig")


@pytest.mark.slow
def test_types_of_the_rigs_programs() -> None:
    _run("mypy", "--scripts-are-modules", "vm-tests/run", "vm-tests/kernels")


def test_spelling() -> None:
    _run("codespell_lib", *TEXTS)
