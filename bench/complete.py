"""R10: a complete image beside an EROFS that was never compressed, page caches dropped: what readers pay for lazy.

All are file-backed mounts of the same tree on the same disk. Ours were mounted empty, filled, and have lost their
marks: that no read comes to the daemon any more is checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.demo import run
from bench.measure import Row, Sample, ratios, shown, timed
from bench.node import BUILDER, Node, drop_caches
from bench.peers import mkfs_erofs
from bench.workload import start_application
from mounts import mount_erofs, umount2
from tests.images import catalog
from tests.images.layout import push
from tests.support.registry import docker_registry

READS = 2000
MANY_FILES = 64
FORMS = ("encoded", "decoded")
IMAGE = "debian:12"
# What is measured, the goal for the encoded and for the decoded form (0: none is set).
WORKLOADS: list[tuple[str, str, float, float]] = [
    ("start", "application start", 0.98, 0.98),
    ("tar", "tar of the tree", 0.8, 0.98),
    ("random1", "random 4 KiB reads, 1 job", 0, 0.98),
    ("random4", "random 4 KiB reads, 4 jobs", 0, 0.98),
]


def rows(runs: int) -> list[Row]:
    """The four trees in turn, each workload; the first to go changes from run to run."""
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name, ExitStack() as stack:
        scratch = Path(name)
        mounts, commands = _plain_mounts(scratch, stack)
        registry = stack.enter_context(docker_registry(scratch / "registry"))
        node = stack.enter_context(Node(scratch / "node", "--insecure"))
        mounts |= dict(_complete_mounts(scratch, registry, node, stack))
        names = _largest(mounts["plain"])
        measures: dict[str, Callable[[Path], float]] = {
            "start": _start,
            "tar": _tar,
            "random1": lambda mount: _random_reads(mount, names, 1),
            "random4": lambda mount: _random_reads(mount, names, 4),
        }
        for mount in mounts.values():
            _tar(mount)  # whatever lies below this machine's disk is warm for all alike
        events = _events(node)
        # A run of random reads is short, and the disk's part in it varies by far more than what is looked for.
        more = {"start": 2 * runs + 1, "tar": runs} | dict.fromkeys(("random1", "random4"), 6 * runs + 1)
        samples = {what: _in_turn(more[what], mounts, measure) for what, measure in measures.items()}
        if _events(node) != events:
            raise RuntimeError("a complete image still asks the daemon")
        drop_caches()
        speed = (scratch / "plain.erofs").stat().st_size / timed(["cat", scratch / "plain.erofs"]) / 1e6
    return [row for form in FORMS for row in _rows(form, samples, commands, speed)]


def _plain_mounts(scratch: Path, stack: ExitStack) -> tuple[dict[str, Path], list[str]]:
    """The tree as mkfs.erofs makes it, without compression and with."""
    run("umoci", "unpack", "--image", f"{catalog.image('debian') / 'oci'}:latest", scratch / "tree")
    mkfs, tree = mkfs_erofs(), scratch / "tree/rootfs"
    mounts, commands = {}, []
    for name, options in (("plain", []), ("mkfs", ["-zzstd,level=3", "-C65536"])):
        command: list[str | Path] = [mkfs, "--quiet", *options, scratch / f"{name}.erofs", tree]
        run(*command)
        commands.append(shown(command, scratch))
        mounts[name] = stack.enter_context(_mounted(scratch / f"{name}.erofs", scratch / f"mnt-{name}"))
    run("rm", "-rf", scratch / "tree")
    commands += ["mount -t erofs $W/plain.erofs $W/mnt-plain", "tar -C $W/mnt-plain -cf - . | cat >/dev/null"]
    return mounts, commands


@contextmanager
def _mounted(image: Path, target: Path) -> Iterator[Path]:
    target.mkdir()
    mount_erofs(image, [], [], target)
    try:
        yield target
    finally:
        umount2(target)


def _complete_mounts(scratch: Path, registry: str, node: Node, stack: ExitStack) -> Iterator[tuple[str, Path]]:
    """The image in both forms, mounted, filled, and without marks."""
    image = f"docker://{registry}/{IMAGE}"
    push(catalog.image("debian") / "oci", f"{registry}/{IMAGE}")
    run(BUILDER, "convert", "--insecure", image, f"{image}-erofs")
    for form in FORMS:
        target = scratch / f"mnt-{form}"
        target.mkdir()
        node.run("mount", "--form", form, image, target)
        stack.callback(node.umount, target)
        node.run("prefetch", "--form", form, image)
        yield form, target
    for _ in range(120):
        stats = node.ask("stats")
        if stats["complete_blobs"] == stats["open_blobs"]:
            return
        time.sleep(0.5)
    raise RuntimeError(f"what is complete keeps its mark: {stats}")


def _events(node: Node) -> int:
    return int(node.ask("status")["keeper"]["counters"]["events"])


def _in_turn(runs: int, mounts: dict[str, Path], measure: Callable[[Path], float]) -> dict[str, Sample]:
    samples = {name: Sample() for name in mounts}
    names = list(mounts)
    for number in range(runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].add(measure(mounts[name]))
    return samples


def _start(mount: Path) -> float:
    drop_caches()
    return start_application(mount)


def _tar(mount: Path) -> float:
    drop_caches()
    # A pipe, for tar reads nothing when it sees that it writes to /dev/null.
    return timed(["sh", "-c", f"tar -C {mount} -cf - . | cat >/dev/null"])


def _largest(mount: Path) -> list[Path]:
    """The largest files, as names below the mount."""
    sizes = {path: path.lstat().st_size for path in mount.rglob("*") if not path.is_symlink() and path.is_file()}
    chosen = sorted(sizes, key=lambda path: (-sizes[path], path))[:MANY_FILES]
    return [path.relative_to(mount) for path in chosen]


def _random_reads(mount: Path, names: list[Path], jobs: int) -> float:
    """Seconds of random reads in some files."""
    command = [sys.executable, "-m", "bench.random_reads", "--jobs", str(jobs), "--reads", str(READS)]
    done = subprocess.run([*command, *(mount / name for name in names)], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent)  # fmt: skip
    return float(json.loads(done.stdout)["seconds"])


def _rows(form: str, samples: dict[str, dict[str, Sample]], commands: list[str], disk: float) -> Iterator[Row]:
    for what, title, encoded_goal, decoded_goal in WORKLOADS:
        measured = samples[what]
        ratio = ratios(measured["plain"], measured[form])
        peers = {}
        if "mkfs" in measured:
            peers["mkfs.erofs zstd 64K"] = ratios(measured["plain"], measured["mkfs"]).median
        peer = ", ".join(
            [f"plain {measured['plain'].text('s', 2)}", *(f"{name} {value:.2f}×" for name, value in peers.items())]
        )
        limit = f"the disk gives {disk:.0f} MB/s in one stream" if what == "tar" else ""
        yield Row(
            "R10", f"{title}: plain EROFS / ours, {form}", measured[form].text("s", 2), peer,
            ratio.median, encoded_goal if form == "encoded" else decoded_goal, larger=True, unit="×",
            samples={name: sample.values for name, sample in measured.items()}, peers=peers, limit=limit,
            commands=commands,
        )  # fmt: skip
