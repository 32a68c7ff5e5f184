"""The documentation says what the commands do: man pages, exit codes, completion, links."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import erofs_builder.errors
import loader.errors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "vm-tests"))

from rig import report  # noqa: E402

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _make_man() -> ModuleType:
    file_loader = importlib.machinery.SourceFileLoader("make_man", str(ROOT / "scripts" / "make-man"))
    spec = importlib.util.spec_from_loader("make_man", file_loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    file_loader.exec_module(module)
    return module


def test_man_pages_are_those_of_the_commands() -> None:
    for name, text in _make_man().pages().items():
        assert (ROOT / "docs" / "man" / name).read_text() == text, f"{name}: run scripts/make-man"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "man").iterdir()), ids=lambda page: page.name)
def test_man_page_is_clean_roff(page: Path) -> None:
    # -ww: every warning of groff, such as an unknown macro or a line that it cannot break.
    done = subprocess.run(["groff", "-man", "-Kutf8", "-Tutf8", "-ww", page], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "erofs-ondemand" in done.stdout


def test_every_exit_code_is_documented() -> None:
    documented = set(re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE))
    used = {
        str(value.exit_code)
        for module in (erofs_builder.errors, loader.errors)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception) and hasattr(value, "exit_code")
    }
    assert used and used <= documented


def test_what_does_not_come_from_runs_is_on_the_kernels_page_as_the_rig_writes_it() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert page.startswith(report.HEAD) and page.endswith(report.LIMITS)


@pytest.mark.parametrize("command", ["erofs-builder", "erofs-loader"])
def test_help_has_every_exit_code(command: str) -> None:
    done = subprocess.run([Path(sys.executable).parent / command, "--help"], capture_output=True, text=True)
    listed = re.findall(r"\d+", done.stdout.split("Exit codes:")[1])
    assert listed == re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", ["erofs-builder", "erofs-loader"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(command: str, shell: str) -> None:
    variable = f"_{command.upper().replace('-', '_')}_COMPLETE"
    program = Path(sys.executable).parent / command
    done = subprocess.run([program], env={**os.environ, variable: f"{shell}_source"}, capture_output=True, text=True)
    assert done.returncode == 0 and command in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
