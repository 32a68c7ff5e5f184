"""What pip makes of the project: a wheel with the extensions, and an installation whose commands start."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from loader import __version__

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = ["cachefiles/_kabi", "confine/_kabi", "erofs_builder/_hot", "fanotify/_kabi", "mounts/_kabi"]

pytestmark = pytest.mark.slow


def test_status_tells_the_packages_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, as someone who clones gets them."""
    copy = tmp_path_factory.mktemp("checkout")
    archive = subprocess.Popen(
        f"git ls-files -z | tar --null -T - --ignore-failed-read -cf - | tar -C '{copy}' -xf -", shell=True, cwd=ROOT
    )
    assert archive.wait() == 0
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, checkout)
    (built,) = directory.glob("*.whl")
    return built


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_carries_the_extensions(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for extension in EXTENSIONS:
        assert any(name.startswith(extension) and name.endswith(".so") for name in names), f"{extension} is missing"
    assert not [name for name in names if name.startswith(("tests/", "bench/", "vm-tests/"))]


@pytest.mark.timeout(600)
def test_clean_installation_gives_working_commands(wheel: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    _run(tmp_path / "venv/bin/python", "-m", "pip", "install", "-q", wheel)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(scripts) == ["erofs-builder", "erofs-loader"]
    for script in scripts:
        assert "Usage" in _run(tmp_path / "venv/bin" / script, "--help")
