"""What pip makes of the project: a wheel with the extensions, and an installation whose commands start."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from loader import __version__

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = [
    "cachefiles/_kabi",
    "confine/_kabi",
    "erofs_builder/_hot",
    "fanotify/_kabi",
    "loader/_take",
    "mounts/_kabi",
]

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
def test_clean_installation_gives_working_commands(checkout: Path, tmp_path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(scripts) == ["erofs-builder", "erofs-loader"]
    prefix = tmp_path / "prefix"
    install = checkout / "scripts" / "install.sh"
    _run("env", f"PYTHON={sys.executable}", install, prefix)
    for script in scripts:
        assert "Usage" in _run(prefix / "bin" / script, "--help")
        assert (prefix / "share/man/man1" / f"{script}.1").is_file()
        assert script in (prefix / "share/bash-completion/completions" / script).read_text()
    unit = (prefix / "lib/systemd/system/erofs-loader.service").read_text()
    assert f"\nExecStart={prefix}/bin/erofs-loader serve\n" in unit and "/bin/kill -HUP" in unit
    _run(install, "--remove", prefix)
    assert not [path for path in prefix.rglob("*") if not path.is_dir()]


def test_installing_without_a_compiler_names_the_packages(checkout: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["env", "CC=no-such-compiler", checkout / "scripts" / "install.sh", tmp_path / "prefix"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "apt-get install" in done.stderr and "gcc" in done.stderr
    assert not (tmp_path / "prefix").exists()


def test_a_source_archive_has_what_is_installed(checkout: Path, tmp_path: Path) -> None:
    _run("env", "-C", checkout, sys.executable, "-c",
         "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", tmp_path)  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        names = {name.split("/", 1)[-1] for name in stream.getnames()}
    tracked = _run("git", "-C", ROOT, "ls-files", "docs", "systemd", "erofs_builder", "loader", "mounts").split()
    assert {*tracked, "LICENSE", "README.md", "scripts/install.sh"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "vm-tests/"))]
