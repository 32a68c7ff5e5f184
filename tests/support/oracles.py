"""Trees of the test images as other programs unpack them, artifacts as our builder makes them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mounts import mount_erofs, umount2
from tests.images import catalog
from tests.images.layout import Layout, decompress_layers

# The paths whose mtime nothing in an image defines, where the image does not say: the root of layers without "./".
ROOT_ONLY = ["."]
PYTHON = Path(sys.executable)
BUILDER = PYTHON.parent / "erofs-builder"
PROJECT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, timeout: float = 280) -> str:
    """Run a program that must succeed; returns its stdout."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, cwd=PROJECT)
    stdout, stderr = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}: exit {done.returncode}\n{stdout[-3000:]}{stderr[-3000:]}"
    )
    return stdout


def undefined_mtimes(image: str) -> list[str]:
    """The paths of a test image whose mtime is left to who unpacks it."""
    listed = catalog.image(image) / "undefined-mtimes.json"
    return list(json.loads(listed.read_text())) if listed.exists() else ROOT_ONLY


@contextlib.contextmanager
def tmpfs(directory: Path, size: str = "4g") -> Iterator[Path]:
    """A tmpfs at `directory`, which is made: unlike ext4 it holds any time."""
    directory.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "oracle", directory)
    try:
        yield directory
    finally:
        umount2(directory)


def umoci_unpack(image: str, scratch: Path, tag: str = "latest") -> Path:
    """Unpack a test image with umoci below `scratch`; returns the tree."""
    directory = catalog.image(image)
    layout = next(path for path in (directory / "oracle", directory / "oci") if path.exists())
    if any("zstd" in layer["mediaType"] for layer in Layout(layout).manifest(tag)["layers"]):
        decompress_layers(layout, scratch / "plain")  # umoci 0.4 knows no zstd
        layout = scratch / "plain"
    run("umoci", "unpack", "--image", f"{layout}:{tag}", scratch / "bundle")
    return scratch / "bundle" / "rootfs"


@contextlib.contextmanager
def buildah_mount(layout: Path, tag: str, scratch: Path) -> Iterator[Path]:
    """The tree of an image as buildah mounts it, with a storage of its own below `scratch`."""
    root, run_root = scratch / "storage", scratch / "run"
    buildah = ["buildah", "--root", str(root), "--runroot", str(run_root), "--storage-driver", "vfs"]
    name = "localhost/oracle:latest"
    run("skopeo", "copy", "-q", f"oci:{layout}:{tag}", f"containers-storage:[vfs@{root}+{run_root}]{name}")
    run(*buildah, "from", "--pull-never", "--name", "oracle", name)
    try:
        yield Path(run(*buildah, "mount", "oracle").strip())
    finally:
        run(*buildah, "umount", "oracle")
        run(*buildah, "rm", "oracle")


def convert(image: str, target: Path, tag: str = "latest") -> str:
    """Convert a test image into an OCI layout at `target`; returns the artifact's reference."""
    reference = f"oci:{target}:{tag}"
    run(BUILDER, "convert", f"oci:{catalog.image(image) / 'oci'}:{tag}", reference)
    return reference


@contextlib.contextmanager
def mounted(source: Path, target: Path, options: Sequence[str] = ()) -> Iterator[Path]:
    """A flat EROFS file, mounted by the kernel at `target`, which is made."""
    target.mkdir(parents=True, exist_ok=True)
    mount_erofs(source, [], options, target)
    try:
        yield target
    finally:
        umount2(target)


def assert_same(expected: Path, actual: Path, *options: str, timeout: float = 280) -> None:
    """Compare two trees in a process of its own, which can be ended when a mount does not answer."""
    command = [sys.executable, "-m", "tests.support.treediff", str(expected), str(actual), *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def ignoring_mtimes(paths: Sequence[str]) -> list[str]:
    """Options of the comparison."""
    return [f"--ignore-mtime={path}" for path in paths]
