"""R13: what an image costs the node's disk: bytes on it once complete, and bytes written for those that were read.

Bytes do not depend on the run, so this runs once. Written is what the daemon's processes had the kernel write
(`write_bytes` of /proc/PID/io): cache files, bitmaps, records.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Row, shown, timed
from bench.node import Node, drop_caches, written
from bench.peers import nydus_builds, push_blob
from bench.published import published
from bench.residency import resident_bytes
from bench.workload import start_application

_START_NOTE = (
    "A frame is written whole, with what lies beside the pages that are read, and so is the metadata. With a trace "
    "13.9 MB cross the link, and the goal is 13.0. Next: nothing for images as they are; a layout rebuilt from a trace "
    "has frames of read pages alone (R1: half of the bytes)."
)


@dataclass
class Cost:
    """Bytes: allocated on the disk, and written, when all of a tree had been read."""

    disk: int
    written: int


def rows(_: int) -> list[Row]:
    """Read all of the image cold, through ours in both forms and through the peers; then only what a start reads."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with published(scratch) as debian:
            unpacked = _file_bytes(debian.tree)
            peers, notes, commands = _peers(scratch, debian.registry)
            ours = {form: _read_all(scratch / form, debian.image, form) for form in ("encoded", "decoded")}
            start_written, start_read = _start(scratch / "start", debian.image)
    return _rows(unpacked, ours, peers, notes, commands, start_written, start_read)


def _file_bytes(root: Path) -> int:
    """The sizes of all regular files below `root`, each once."""
    files = {}
    for directory, _, names in os.walk(root):
        for name in names:
            status = (Path(directory) / name).lstat()
            if not (Path(directory) / name).is_symlink():
                files[status.st_ino] = status.st_size
    return sum(files.values())


def _allocated(root: Path) -> int:
    return sum(
        (Path(directory) / name).lstat().st_blocks * 512
        for directory, _, names in os.walk(root)
        for name in names
    )  # fmt: skip


def _tar(mount: Path) -> None:
    drop_caches()
    timed(["sh", "-c", f"tar -C {mount} -cf - . | cat >/dev/null"])
    os.sync()


def _read_all(place: Path, image: str, form: str) -> Cost:
    with Node(place, "--insecure") as node:
        before = _written_by(node)
        target = place / "mnt"
        target.mkdir()
        node.run("mount", "--form", form, image, target)
        try:
            _tar(target)
            amount = _written_by(node) - before
            node.run("prefetch", "--form", form, image)  # the few frames of what an upper layer hides
            os.sync()
            return Cost(_allocated(node.state), amount)
        finally:
            node.umount(target)


def _start(place: Path, image: str) -> tuple[int, int]:
    """Bytes written for a start, and bytes of the image's files that it left in the page cache."""
    with Node(place, "--insecure") as node:
        drop_caches()
        before = _written_by(node)
        node.mount(image, place / "mnt")
        try:
            start_application(place / "mnt")
            os.sync()
            return _written_by(node) - before, resident_bytes(place / "mnt")
        finally:
            node.umount(place / "mnt")


def _written_by(node: Node) -> int:
    return sum(written(pid) for pid in node.processes())


def _peers(scratch: Path, registry: str) -> tuple[dict[str, Cost], list[str], list[str]]:
    tree, costs, notes, commands = scratch / "tree/rootfs", dict[str, Cost](), list[str](), list[str]()
    for _, name, image, mount in nydus_builds(tree, scratch, notes):
        push_blob(registry, "debian", image.blob.read_bytes())
        place = scratch / name.replace(" ", "-")
        with mount(image.bootstrap, registry, "debian", place) as peer:
            commands.append(shown(peer.command, scratch))
            _tar(peer.mount_point)
            costs[name] = Cost(_allocated(place / "cache") + image.bootstrap.stat().st_size, written(peer.pid))
        shutil.rmtree(place)
    shutil.rmtree(scratch / "tree")
    return costs, notes, commands


def _rows(
    unpacked: int, ours: dict[str, Cost], peers: dict[str, Cost], notes: list[str], commands: list[str],
    start_written: int, start_read: int,
) -> list[Row]:  # fmt: skip
    def share(count: int) -> float:
        return count / unpacked

    encoded, decoded = ours["encoded"], ours["decoded"]
    disk = {name: share(cost.disk) for name, cost in peers.items()} | {"ours, decoded": share(decoded.disk)}
    amount = {name: share(cost.written) for name, cost in peers.items()} | {"ours, decoded": share(decoded.written)}
    return [
        Row("R13", "bytes on the disk for a complete image / unpacked size", f"{encoded.disk / 1e6:.1f} MB",
            _listed(disk, notes), share(encoded.disk), 0.36, larger=False, unit="×", peers=disk, commands=commands,
            samples={"disk": [encoded.disk], "unpacked": [unpacked]}),
        Row("R13", "bytes written / byte read cold, all of the tree", f"{encoded.written / 1e6:.1f} MB",
            _listed(amount, notes), share(encoded.written), 0.4, larger=False, unit="×", peers=amount,
            samples={"written": [encoded.written], "read": [unpacked]}),
        Row("R13", "bytes written / byte read cold, an application start", f"{start_written / 1e6:.1f} MB",
            f"{start_read / 1e6:.1f} MB of the image's files in the page cache", start_written / start_read, 0.4,
            larger=False, unit="×", samples={"written": [start_written], "read": [start_read]}, note=_START_NOTE),
    ]  # fmt: skip


def _listed(figures: dict[str, float], notes: list[str]) -> str:
    return ", ".join([*(f"{name} {value:.2f}×" for name, value in figures.items()), *notes])
