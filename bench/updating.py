"""R7: what a security update adds to the registry when the artifact of the image before it is the base.

And what a node that has the image before would have to fetch if it were given deltas (bench/deltas.py).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from bench import deltas
from bench.measure import Row
from bench.node import BUILDER
from erofs_builder.layer import Options
from tests.images import catalog

_DELTA_LEVEL = 3  # 9 makes deltas 5 % smaller


def rows(_: int) -> list[Row]:
    """One conversion: its bytes do not depend on the machine or on the run."""
    old, new = catalog.image("debian-old") / "oci", catalog.image("debian") / "oci"
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        _convert(f"oci:{old}:latest", f"oci:{scratch}/artifact:old")
        added = _convert(f"oci:{new}:latest", f"oci:{scratch}/artifact:new", "--base", f"oci:{scratch}/artifact:old")
        changed, compressed = _changed(_unpacked(old, scratch / "old"), _unpacked(new, scratch / "new"), scratch)
    found = deltas.measure(old, new, _DELTA_LEVEL, Options())
    if found.rebuilt != found.frames:
        raise RuntimeError(f"only {found.rebuilt} of {found.frames} frames could be rebuilt from their deltas")
    return [
        Row("R7", f"new blob bytes of an update ({changed} changed files) / zstd -3 of those files",
            f"{added / 1e6:.1f} MB", f"zstd -3 {compressed / 1e6:.1f} MB", added / compressed, 0.95, larger=False,
            unit="×", samples={"added": [added], "zstd": [compressed], "files": [changed]}),
        Row("R7", f"the same as deltas to what a node has, {found.frames} frames rebuilt (not in the daemon)",
            f"{found.deltas / 1e6:.1f} MB, {found.rebuild / found.frames * 1e3:.1f} ms a frame",
            f"zstd -3 {compressed / 1e6:.1f} MB", found.deltas / compressed, 0.75, larger=False,
            unit="×", samples={"deltas": [found.deltas], "frames": [found.plain], "seconds": [found.rebuild]}),
    ]  # fmt: skip


def _convert(source: str, target: str, *options: str) -> int:
    """Bytes of the blobs that were not there before."""
    done = subprocess.run(
        [BUILDER, "convert", source, target, "--json", *options], check=True, capture_output=True, text=True
    )
    (image,) = json.loads(done.stdout)["images"]
    return sum(blob["size"] for blob in image["blobs"] if blob["stored"] != "there")


def _unpacked(layout: Path, directory: Path) -> Path:
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", directory], check=True, capture_output=True)
    return directory / "rootfs"


def _changed(old: Path, new: Path, scratch: Path) -> tuple[int, int]:
    """How many files of `new` have content that `old` has nowhere, and their size as one compressed tar."""
    known = set(_digests(old).values())
    names = sorted(name for name, digest in _digests(new).items() if digest not in known)
    (scratch / "names").write_bytes(b"\0".join(name.encode("utf-8", "surrogateescape") for name in names))
    tar: list[str | Path] = [
        "tar",
        "-C",
        new,
        "--null",
        "--verbatim-files-from",
        "-T",
        scratch / "names",
        "-cf",
        scratch / "changed.tar",
    ]
    subprocess.run(tar, check=True)
    subprocess.run(["zstd", "-3", "-q", scratch / "changed.tar", "-o", scratch / "changed.zst"], check=True)
    return len(names), (scratch / "changed.zst").stat().st_size


def _digests(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).digest()
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
