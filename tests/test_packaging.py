"""What pip makes of the project: a wheel with the extensions, and an installation whose commands start."""

from __future__ import annotations

import os
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
    "loader/keeper/_events",
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
    done = subprocess.run(["env", f"PYTHON={sys.executable}", install, prefix], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # systemd does not look there.
    assert f"systemctl enable --now {prefix}/lib/systemd/system/erofs-loader.service\n" in done.stderr
    for script in scripts:
        assert "Usage" in _run(prefix / "bin" / script, "--help")
        assert (prefix / "share/man/man1" / f"{script}.1").is_file()
        assert script in (prefix / "share/bash-completion/completions" / script).read_text()
    unit = (prefix / "lib/systemd/system/erofs-loader.service").read_text()
    assert f"\nExecStart={prefix}/bin/erofs-loader serve\n" in unit and "/bin/kill -HUP" in unit
    _run(install, "--remove", prefix)
    assert not [path for path in prefix.rglob("*") if not path.is_dir()]


def _refused(checkout: Path, *arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [checkout / "scripts" / "install.sh", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 1 and all(line.startswith("install: ") for line in done.stderr.splitlines()), done.stderr
    return done.stderr


@pytest.mark.parametrize("missing", [{"CC": "no-such-compiler"}, {"PYTHON": "no-such-python"}, {"PYTHON": "false"}])
def test_what_installing_takes_is_named(checkout: Path, tmp_path: Path, missing: dict[str, str]) -> None:
    """`false` stands for a Python that is too old, or has no headers."""
    said = _refused(checkout, tmp_path / "prefix", **missing)
    assert "Python 3.11" in said and "apt-get install" in said and " gcc " in said and " python3 " in said
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize("options", [(), ("--remove",)])
def test_a_prefix_that_cannot_be_written_is_named(checkout: Path, options: tuple[str, ...]) -> None:
    assert "in /dev/null/prefix: run it as root, or choose another" in _refused(checkout, *options, "/dev/null/prefix")


def test_the_program_of_a_running_unit_is_not_taken_away(checkout: Path, tmp_path: Path) -> None:
    prefix, other, programs = (tmp_path / name for name in ("prefix", "other", "programs"))
    for place in (prefix, other):
        (place / "bin").mkdir(parents=True)
        (place / "bin/erofs-loader").touch()
    programs.mkdir()
    systemctl = programs / "systemctl"
    systemctl.write_text(
        f'#!/bin/sh\n[ "$1" = is-active ] && echo active || echo "ExecStart={{ path={prefix}/bin/erofs-loader ; x }}"\n'
    )
    systemctl.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    assert "systemctl disable --now erofs-loader" in _refused(checkout, "--remove", prefix, PATH=path)
    assert (prefix / "bin/erofs-loader").exists()
    _run("env", f"PATH={path}", checkout / "scripts" / "install.sh", "--remove", other)
    assert not (other / "bin/erofs-loader").exists()


def test_a_source_archive_has_what_is_installed(checkout: Path, tmp_path: Path) -> None:
    _run("env", "-C", checkout, sys.executable, "-c",
         "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", tmp_path)  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        names = {name.split("/", 1)[-1] for name in stream.getnames()}
    tracked = _run("git", "-C", ROOT, "ls-files", "docs", "systemd", "erofs_builder", "loader", "mounts").split()
    assert {*tracked, "LICENSE", "README.md", "scripts/install.sh"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "vm-tests/"))]
