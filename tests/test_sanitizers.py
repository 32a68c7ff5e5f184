"""The C under AddressSanitizer and UndefinedBehaviorSanitizer: its fuzzer, and the extensions in their tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import seeds
from fuzz.run import C_FOLDERS

ROOT = Path(__file__).parent.parent
FLAGS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
BUILDS = sorted(build.relative_to(ROOT) for build in ROOT.glob("*/**/_*_build.py") if ".venv" not in build.parts)
PACKAGES = sorted({build.parts[0] for build in BUILDS})
# What exercises the C of each of them without a kernel that has to have something.
TESTS = (
    "test_tar.py",
    "test_contents.py",
    "test_abi.py",
    "test_blob.py",
    "test_mounts.py",
    "test_take.py",
    "test_take_frames.py",
    "test_keeper_events.py",
)


def test_many_mutations_of_tars(tmp_path: Path) -> None:
    """The long fuzzer's entry point behind a small driver: gcc is enough."""
    program, corpus = tmp_path / "mutate", tmp_path / "corpus"
    seeds.write(corpus)
    folders = [ROOT / folder for folder in C_FOLDERS]
    sources = [ROOT / "fuzz/c/mutate.c", ROOT / "fuzz/c/hot_fuzz.c", *(file for f in folders for file in f.glob("*.c"))]
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run(["gcc", *FLAGS, *includes, *map(str, sources), "-lzstd", "-o", str(program)], check=True)
    files = sorted(map(str, (corpus / "tar").iterdir()))
    run = subprocess.run([str(program), "20000", *files], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == f"{20000 * len(files)} inputs\n"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout whose extensions are built with the sanitizers."""
    copy = tmp_path_factory.mktemp("sanitized")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for name in (*PACKAGES, "tests", "fuzz"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for build in BUILDS:
        subprocess.run(
            [sys.executable, str(build)],
            cwd=copy,
            env=os.environ | {"CFLAGS": " ".join(FLAGS), "LDFLAGS": "-fsanitize=address,undefined"},
            check=True,
            capture_output=True,
        )
    return copy


@pytest.mark.slow
def test_extensions_in_their_own_tests(sanitized: Path) -> None:
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = ENVIRONMENT | {"LD_PRELOAD": library, "PYTHONPATH": str(sanitized), "PYTHONMALLOC": "malloc"}
    loaded = "import erofs_builder._hot as m; print(m.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", loaded], cwd=sanitized, env=environment, check=True, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(sanitized))
    tests = [f"tests/{name}" for name in TESTS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not root and not vm", "-p", "no:cacheprovider", *tests],
        cwd=sanitized,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "ERROR: AddressSanitizer" not in run.stderr and "runtime error" not in run.stderr
