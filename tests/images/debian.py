"""A Debian image as people build them: base, then the runtime, then a compiler; three layers made by umoci.

About 520 MB, 14,000 entries, 200 MB as gzip layers. The layers are what `umoci repack` finds changed between three
trees that mmdebstrap makes from the packages that this machine's suite has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.images.layout import decompress_layers

SUITE = "bookworm"
RUNTIME = ("python3", "python3-numpy", "python3-requests")
COMPILER = ("build-essential",)
# Files made during installation get this time, so that two trees of the same packages differ only where they must. Not
# by SOURCE_DATE_EPOCH: it has Python check byte code by its source's hash, so that every start reads the sources too.
# Installed by apt alone, as in images, byte code is checked by its source's time.
EPOCH = 1735689600


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise RuntimeError(f"{command[0]} failed with {done.returncode}")


def _packages_tree(tar: Path, packages: Sequence[str], updates: bool) -> None:
    include = ["--include=" + ",".join(packages)] if packages else []
    if not updates:
        # Before its first update apt forgets the sources of security and other updates.
        include.append('--setup-hook=sed -i -e /security/d -e /-updates/d "$1/etc/apt/sources.list"')
    _run("mmdebstrap", "--variant=minbase", "--format=tar", *include, SUITE, tar)


def _replace_tree(root: Path, tar: Path) -> None:
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    _run("tar", "-C", root, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", tar)


def _settle_times(root: Path, installed: float) -> None:
    """Give what was made since `installed` the time EPOCH."""
    for directory, directories, files in os.walk(root, topdown=False):
        for name in (*directories, *files, "."):
            path = Path(directory) / name
            if path.lstat().st_mtime >= installed:
                os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def build_debian(directory: Path, updates: bool = True) -> None:
    """Make the image in `directory`/oci; without `updates` from the packages of the point release alone."""
    image, bundle, tar = f"{directory / 'oci'}:latest", directory / "bundle", directory / "tree.tar"
    _run("umoci", "init", "--layout", directory / "oci")
    _run("umoci", "new", "--image", image)
    _run("umoci", "unpack", "--image", image, bundle)
    for packages in ((), RUNTIME, RUNTIME + COMPILER):
        begin = time.time() - 1
        _packages_tree(tar, packages, updates)
        _replace_tree(bundle / "rootfs", tar)
        _settle_times(bundle / "rootfs", begin)
        _run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
    _run(
        *("umoci", "config", "--image", image, "--config.entrypoint", "python3"),
        *("--config.env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    )
    _run("umoci", "gc", "--layout", directory / "oci")
    shutil.rmtree(bundle)
    tar.unlink()


def build_debian_plain(directory: Path, debian: Path) -> None:
    """The same image with uncompressed layers, from the one in `debian`."""
    decompress_layers(debian / "oci", directory / "oci")
