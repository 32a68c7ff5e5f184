"""R14: a cold image from a registry that answers at once: the start of an application, a tar of all of the tree, and
every file in random order by four readers.

Peers read the same tree through the same registry (quick.py), in turn; those of containerd, layer by layer. Nothing is
in any cache, but all blobs are in the registry's page cache. The mounts are there before: what counts is reading.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from bench.measure import Row, Sample, timed
from bench.node import Node, drop_caches
from bench.peers import NydusBuilt, nydus_builds, push_blob
from bench.peers_containerd import Snapshotter, SnapshotterNode, publish_all
from bench.published import IMAGE, published
from bench.quick import Quick
from bench.workload import start_application

READERS, FILES_EACH = 4, 40
_SEED = 1
_TAR = "tar -C $W/mnt -cf - . | cat >/dev/null"
_FILES = f"cd $W/mnt && xargs -0 -P{READERS} -n{FILES_EACH} cat <$W/names >/dev/null"
FORMS = ("encoded", "decoded")
LOSES_LINKS = "Nydus 3"  # two of the tree's, so that tar ends with 1
_LINES = {  # what is read, and how
    "an application's start": "",
    "a tar of all of the tree": _TAR,
    f"every file in random order, {READERS} readers": _FILES,
}
_DECODED_NOTE = (
    "the form for kernels before 6.10: decoded bytes are three times as many to write, and until a blob is whole each"
    " file's first READ asks the keeper. Nydus 2 verifies nothing"
)
_RANDOM_NOTE = (
    "nothing can be told of what is read next, so each frame is asked for alone, with what lies beside it of the same"
    " file or package; Nydus 2 asks for 1 MiB wherever it is read, of which a start needs little"
)

Mounted = Callable[[], AbstractContextManager[Path]]


def rows(runs: int) -> list[Row]:
    """Ours in both forms, and the peers, in turn."""
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        with published(scratch) as debian:
            peers = list(nydus_builds(debian.tree, scratch, notes))
            for peer in peers:
                push_blob(debian.registry, "debian", peer.image.blob.read_bytes())
            lazy = publish_all(debian.layout, debian.registry, scratch, notes)
            (scratch / "names").write_bytes(_names(debian.tree))
            with Quick(debian.registry, debian.storage) as quick:
                mounts = _mounts(scratch, quick.address, peers, lazy)
                samples = _measure(runs, scratch, mounts)
    return [row for what in samples for row in _rows(what, samples[what], notes)]


def _names(tree: Path) -> bytes:
    """All regular files below a tree in an order that tells nothing, for xargs."""
    names = sorted(
        str((Path(directory) / name).relative_to(tree))
        for directory, _, files in os.walk(tree)
        for name in files
        if (Path(directory) / name).is_file() and not (Path(directory) / name).is_symlink()
    )
    random.Random(_SEED).shuffle(names)
    return b"".join(name.encode() + b"\0" for name in names)


def _mounts(
    scratch: Path, registry: str, peers: list[NydusBuilt], snapshotters: list[Snapshotter]
) -> dict[str, Mounted]:
    mounts: dict[str, Mounted] = {form: partial(_ours, scratch, registry, form) for form in FORMS}
    for peer in peers:
        mounts[peer.title] = partial(_theirs, scratch, registry, peer)
    for snapshotter in snapshotters:
        mounts[snapshotter.title] = partial(_pulled, scratch, registry, snapshotter)
    return mounts


@contextmanager
def _ours(scratch: Path, registry: str, form: str) -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="node-", dir=scratch) as name,
        Node(Path(name), "--insecure") as node,
    ):
        node.mount(f"docker://{registry}/{IMAGE}", Path(name) / "mnt", form)
        try:
            yield Path(name) / "mnt"
        finally:
            node.umount(Path(name) / "mnt")


@contextmanager
def _theirs(scratch: Path, registry: str, peer: NydusBuilt) -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="peer-", dir=scratch) as name,
        peer.mount(peer.image.bootstrap, registry, "debian", Path(name)) as mount,
    ):
        yield mount.mount_point


@contextmanager
def _pulled(scratch: Path, registry: str, snapshotter: Snapshotter) -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="peer-", dir=scratch) as name,
        SnapshotterNode(snapshotter, Path(name)) as node,
    ):
        node.mount(registry)
        yield node.mount_point


def _measure(runs: int, scratch: Path, mounts: dict[str, Mounted]) -> dict[str, dict[str, Sample]]:
    """Seconds, by what is read and by who serves it."""
    samples = {what: {name: Sample() for name in mounts} for what in _LINES}
    for _ in range(runs):
        for what, line in _LINES.items():
            for name, mounted in mounts.items():
                with mounted() as mount:
                    _make_cold(scratch / "registry")
                    shell = ["bash", *(["-o", "pipefail"] if name != LOSES_LINKS else []), "-c"]
                    words = line.replace("$W/mnt", str(mount)).replace("$W", str(scratch))
                    samples[what][name].add(timed([*shell, words]) if line else start_application(mount))
    return samples


def _make_cold(registry: Path) -> None:
    """Nothing but the registry's files in the page cache."""
    drop_caches()
    subprocess.run(["sh", "-c", f"find {registry} -type f -exec cat {{}} + >/dev/null"], check=True)


def _rows(what: str, samples: dict[str, Sample], notes: list[str]) -> list[Row]:
    peers = {name: sample for name, sample in samples.items() if name not in FORMS}
    return [_row(what, form, samples[form], peers, notes) for form in FORMS]


def _row(what: str, form: str, ours: Sample, peers: dict[str, Sample], notes: list[str]) -> Row:
    fastest = min((sample.median for sample in peers.values()), default=0.0)
    listed = [f"{name} {sample.text('s', 2)}" for name, sample in peers.items()] + notes
    line = [_LINES[what]] if _LINES[what] else []
    return Row(
        "R14", f"{what}, loopback" + (", decoded form" if form == "decoded" else ""), ours.text("s", 2),
        "; ".join(listed), fastest / ours.median, 1.0 if peers else 0.0, larger=True, unit="×",
        peers={name: fastest / sample.median for name, sample in peers.items()}, commands=line,
        samples={"ours": ours.values} | {name: sample.values for name, sample in peers.items()},
        note=_DECODED_NOTE if form == "decoded" else _RANDOM_NOTE if _LINES[what] == _FILES else "",
    )  # fmt: skip
