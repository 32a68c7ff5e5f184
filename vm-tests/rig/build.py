"""Get a kernel of the table into the cache: build it from Debian's source, or unpack Debian's own.

A cache entry is a directory `NAME/VERSION-KEY/` with `vmlinuz` and `config`; a kernel built here has `dropped` too
(symbols asked for that it does not have), a stock one `modules/` and `load` (their order). KEY is a digest over the
config fragments and the compiler's version, or over the list of modules. An entry appears by one rename, so a broken
build leaves none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rig import stock
from rig.apt import Apt, later
from rig.table import Image, Kernel, cache_root

# AMD's register headers are a third of the tree, and nothing here compiles them.
SKIPPED = ("*/drivers/gpu/drm/amd/include/*", "*/tools/testing/*", "*/Documentation/devicetree/*")


class BuildError(Exception):
    """A kernel could not be had; the text says which step and where its log is."""


def key(kernel: Kernel) -> str:
    """What else than the version makes a kernel, as a short digest."""
    if kernel.origin == "source":
        compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout
        recipe = kernel.fragment() + compiler.splitlines()[0]
    else:
        recipe = "\n".join(stock.MODULES)
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def cached(kernel: Kernel) -> Image | None:
    """The newest cached image of this kernel made by today's recipe."""
    if kernel.origin == "host":
        return Image(kernel, os.uname().release, Path(), ())
    best: Image | None = None
    suffix = "-" + key(kernel)
    for entry in (cache_root() / kernel.name).glob(f"*{suffix}"):
        image = _image(kernel, entry, entry.name.removesuffix(suffix))
        if best is None or later(image.version, best.version):
            best = image
    return best


def obtain(kernel: Kernel, refresh: bool = False) -> Image:
    """The cached image, or a new one; `refresh` asks the archive for a newer version first."""
    found = cached(kernel)
    if found and (not refresh or kernel.origin == "host"):
        return found
    place = cache_root() / kernel.name
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:  # the tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _obtain(kernel, cached(kernel), refresh)


def _obtain(kernel: Kernel, found: Image | None, refresh: bool) -> Image:
    if found and not refresh:
        return found
    apt = Apt(kernel.suite, cache_root() / "apt")
    apt.update()
    package, version = apt.newest(kernel.package)
    if found and found.version == version:
        return found
    entry = cache_root() / kernel.name / f"{version}-{key(kernel)}"
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".build-") as work:
        result = Path(work) / "entry"
        result.mkdir()
        if kernel.origin == "source":
            _build(kernel, apt.download(package, version, Path(work)), Path(work), result)
        else:
            stock.unpack(apt, package, version, Path(work), result)
        result.rename(entry)
    return _image(kernel, entry, version)


def _image(kernel: Kernel, entry: Path, version: str) -> Image:
    order = entry / "load"
    names = order.read_text().split() if order.exists() else []
    return Image(kernel, version, entry / "vmlinuz", tuple(entry / "modules" / name for name in names))


def _build(kernel: Kernel, deb: Path, work: Path, result: Path) -> None:
    tree = _unpack_source(deb, work)
    out = work / "out"
    out.mkdir()
    fragment = work / "fragment"
    fragment.write_text(kernel.fragment())
    make = ["nice", "-n", "5", "make", "-C", str(tree), f"O={out}", "ARCH=x86_64", f"-j{os.cpu_count() or 1}"]
    log = cache_root() / kernel.name / "build.log"
    with log.open("wb") as stream:
        _step([*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"], stream, log)
        _step([*make, "vmlinux"], stream, log)
    _step(["strip", "-o", str(result / "vmlinuz"), str(out / "vmlinux")], None, log)
    config = (out / ".config").read_text()
    (result / "config").write_text(config)
    missing = dropped(kernel.fragment(), config)
    (result / "dropped").write_text("".join(f"{name}\n" for name in missing))
    print(f"{kernel.name}: symbols this kernel does not have: {' '.join(missing) or 'none'}", file=sys.stderr)


def dropped(fragment: str, config: str) -> list[str]:
    """Symbols that the fragment turns on and the finished config does not have."""
    have = set(config.splitlines())
    asked = [line for line in fragment.splitlines() if line.startswith("CONFIG_") and not line.endswith("=n")]
    return sorted({line.split("=")[0] for line in asked if line not in have})


def _unpack_source(deb: Path, work: Path) -> Path:
    subprocess.run(["dpkg-deb", "-x", str(deb), str(work / "package")], check=True)
    deb.unlink()
    (archive,) = (work / "package/usr/src").glob("linux-source-*.tar.xz")
    excludes = [f"--exclude={pattern}" for pattern in SKIPPED]
    subprocess.run(["tar", "-C", str(work), *excludes, "-xf", str(archive)], check=True)
    shutil.rmtree(work / "package")
    (tree,) = work.glob("linux-source-*")
    return tree


def _step(command: list[str], stream: object, log: Path) -> None:
    done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)  # type: ignore[call-overload]
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: exit {done.returncode}, log in {log}")
