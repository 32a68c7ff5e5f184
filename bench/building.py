"""R5 and R6: how fast layers become an artifact, and how large it is."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.demo import compressed_size
from bench.floor import alone
from bench.measure import Row, Sample, paired, shown, timed
from bench.node import BUILDER
from bench.peers import MissingPeer, NydusImage, mkfs_erofs
from tests.images import catalog
from tests.images.layout import Layout


def rows(runs: int) -> list[Row]:
    """Convert from plain and from gzip layers, beside zstd and the peers' builders, in turn."""
    plain, packed = catalog.image("debian-plain") / "oci", catalog.image("debian") / "oci"
    with tempfile.TemporaryDirectory(prefix="erofs-bench-") as name:
        scratch = Path(name)
        tar = scratch / "layers.tar"
        _concatenate(plain, tar)
        subprocess.run(["umoci", "unpack", "--image", f"{packed}:latest", scratch / "tree"], check=True)
        peers, notes = _peers(scratch / "tree/rootfs", scratch)
        samples = paired(
            runs,
            zstd=lambda: timed(["zstd", "-3", "-T2", "-c"], tar, scratch / "layers.tar.zst"),
            plain=lambda: _convert(plain, scratch / "artifact"),
            gzip=lambda: _convert(packed, scratch / "artifact"),
            **peers,
        )
        sizes = _size_rows(scratch, packed, tar)
        floor = alone(tar, int(sizes[1].samples["blobs"][0]), compressed_size(packed))
        return [*_speed_rows(samples, notes, floor), *sizes]


def _concatenate(layout: Path, tar: Path) -> None:
    blobs = Layout(layout)
    with open(tar, "wb") as out:
        for layer in blobs.manifest("latest")["layers"]:
            with open(blobs.blob_path(layer["digest"]), "rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)


def _convert(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    return timed([BUILDER, "convert", f"oci:{source}:latest", f"oci:{target}:latest"])


def _peers(tree: Path, scratch: Path) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """The builders of others, from an unpacked directory, as they have no way from layers in one step."""
    measurements: dict[str, Callable[[], float]] = {}
    notes = []
    try:
        command = NydusImage.command(tree, scratch / "nydus")

        def build_nydus() -> float:
            shutil.rmtree(scratch / "nydus", ignore_errors=True)
            (scratch / "nydus/blobs").mkdir(parents=True)
            return timed(command)

        measurements["nydus2"] = build_nydus
    except MissingPeer as missing:
        notes.append(str(missing))
    try:
        mkfs = mkfs_erofs()
        options = ["--quiet", "-zzstd,level=3", "-C65536"]
        measurements["mkfs"] = lambda: timed([mkfs, *options, scratch / "mkfs.erofs", tree])
    except MissingPeer as missing:
        notes.append(str(missing))
    return measurements, notes


def _speed_rows(samples: dict[str, Sample], notes: list[str], floor: dict[str, float]) -> list[Row]:
    zstd = samples["zstd"].median
    names = {"nydus2": "Nydus 2", "mkfs": "mkfs.erofs zstd 64K"}
    peers = [f"{title} {zstd / samples[name].median:.2f}×" for name, title in names.items() if name in samples]
    peer = ", ".join([*peers, *notes])
    figures = {title: zstd / samples[name].median for name, title in names.items() if name in samples}
    commands = ["zstd -3 -T2 -c <$W/layers.tar >$W/layers.tar.zst"]
    if "nydus2" in samples:
        commands.append(shown(NydusImage.command(Path("$W/tree"), Path("$W/nydus"))))
    if "mkfs" in samples:
        commands.append("mkfs.erofs --quiet -zzstd,level=3 -C65536 $W/mkfs.erofs $W/tree")
    raw = {name: sample.values for name, sample in samples.items()}
    return [
        Row("R5", f"zstd -3 -T2 of the tar ({zstd:.2f} s) / {what} to artifact", samples[key].text("s", 2), peer,
            zstd / samples[key].median, goal, larger=True, unit="×", samples=raw, peers=figures, commands=commands,
            limit=f"{zstd / floor[key]:.2f}× if compression and digests were all, on every processor, all the time")
        for key, what, goal in (("plain", "plain layers", 0.9), ("gzip", "gzip layers", 0.7))
    ]  # fmt: skip


def _artifact(layout: Path) -> dict[str, Any]:
    """The artifact's manifest in a layout that convert wrote."""
    return Layout(layout).manifest("latest")


def _size_rows(scratch: Path, packed: Path, tar: Path) -> list[Row]:
    manifest = _artifact(scratch / "artifact")
    layers = manifest["layers"]
    inodes = int(manifest["annotations"]["org.erofs-ondemand.inodes"])
    encoded = next(layer for layer in layers if "metadata.encoded" in layer["mediaType"])
    blobs = sum(layer["size"] for layer in layers if "blob.v1" in layer["mediaType"])
    raw = int(encoded["annotations"]["org.erofs-ondemand.payload-size"])
    compressed = (scratch / "layers.tar.zst").stat().st_size
    metadata_peer = blob_peer = "not measured"
    metadata_peers, blob_peers = dict[str, float](), dict[str, float]()
    if (scratch / "nydus/bootstrap").exists():
        nydus = NydusImage(scratch / "nydus")
        wire, size = len(nydus.packed_bootstrap()), nydus.bootstrap.stat().st_size
        metadata_peer = f"Nydus 2 {wire / inodes:.0f} ({size / inodes:.0f} raw)"
        metadata_peers["Nydus 2"] = wire / inodes
        blob_peers["Nydus 2"] = nydus.blob.stat().st_size / compressed
        blob_peer = f"Nydus 2 {nydus.blob.stat().st_size / compressed:.2f}×"
    return [
        Row("R6", f"metadata and frame tables, bytes an inode ({inodes} inodes)",
            f"{encoded['size'] / inodes:.1f} ({raw / inodes:.0f} raw)", metadata_peer, encoded["size"] / inodes, 25,
            larger=False, samples={"wire": [encoded["size"]], "raw": [raw], "inodes": [inodes]},
            peers=metadata_peers),
        Row("R6", "blob bytes / zstd -3 of the tar", f"{blobs / 1e6:.1f} MB", blob_peer, blobs / compressed, 1.08,
            larger=False, unit="×", samples={"blobs": [blobs], "zstd": [compressed]}, peers=blob_peers),
    ]  # fmt: skip
