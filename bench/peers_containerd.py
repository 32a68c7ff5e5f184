"""Lazy snapshotters of containerd: stargz on an image converted to eStargz, SOCI on gzip layers with an index.

CONTAINERD_BIN    directory of containerd and ctr 2.x (scripts/build-go-peers.sh builds all of them)
STARGZ_BIN        directory of containerd-stargz-grpc and ctr-remote
SOCI_BIN          directory of soci and soci-snapshotter-grpc

Both serve each layer by FUSE, below an overlay. What they fetch unasked, in the background, is off, as with the other
peers: it only takes the link from a start, and would count as the start's bytes. A start's order within eStargz
(`ctr-remote images optimize`) is not compared: it ends with "failed to sort tar entries" for layers that lack an entry
of a directory, as packages' do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.demo import run
from bench.peers import MissingPeer, find
from mounts import mountinfo
from tests.images.layout import push
from tests.support.sweep import unmount_below

STARTUP = 20.0  # seconds for a daemon's socket
_UNUSED = ("grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "nri.v1.nri", "internal.v1.opt")  # plugins


class Snapshotter(NamedTuple):
    """A snapshotter's name in containerd, its image in the registry, and what pulls lazily (without its reference)."""

    name: str
    title: str
    image: str
    daemon: str
    settings: str
    pull: tuple[str, ...]


STARGZ = Snapshotter(
    "stargz", "stargz", "stargz/debian:12", "containerd-stargz-grpc",
    "noprefetch = true\nno_background_fetch = true\nno_prometheus = true\n",
    ("images", "rpull", "--plain-http", "--snapshotter", "stargz"),
)  # fmt: skip
SOCI = Snapshotter(
    "soci", "SOCI", "soci/debian:12", "soci-snapshotter-grpc",
    "no_prometheus = true\n[background_fetch]\ndisable = true\n",
    ("images", "rpull", "--plain-http", "--snapshotter", "soci", "--use-containerd-labels"),
)  # fmt: skip


def program(name: str) -> Path:
    """One of the programs; MissingPeer if it is not here."""
    if name in ("containerd", "ctr"):
        return find(name, "CONTAINERD_BIN", "peers/containerd-2*/bin")
    if "soci" in name:
        return find(name, "SOCI_BIN", "peers/soci-*/bin")
    return find(name, "STARGZ_BIN", "peers/stargz-*/bin")


def publish_all(layout: Path, registry: str, scratch: Path, notes: list[str]) -> list[Snapshotter]:
    """A layout's image as each snapshotter's own tool converts it; `notes` gets a line for one that is not here."""
    published = []
    for snapshotter, publish in ((STARGZ, _publish_stargz), (SOCI, _publish_soci)):
        try:
            for name in ("containerd", "ctr", "ctr-remote", snapshotter.daemon):
                program(name)
            publish(layout, registry, scratch)
            published.append(snapshotter)
        except MissingPeer as missing:
            notes.append(str(missing))
    return published


def _publish_stargz(layout: Path, registry: str, scratch: Path) -> None:
    """eStargz with the defaults of ctr-remote: chunks of up to 4 MiB, gzip. Kept in the cache: it takes a minute."""
    image = layout.parent
    kept = image.with_name(f"{image.name}-estargz")
    if not kept.exists():
        with _directory(scratch / "estargz") as directory, _containerd(directory) as containerd:
            source, target = f"{registry}/plain/debian:12", f"{registry}/{STARGZ.image}"
            push(layout, source)
            _run(containerd, "ctr", "content", "fetch", "--plain-http", source)
            _run(containerd, "ctr-remote", "images", "convert", "--estargz", "--oci", source, target)
            _run(containerd, "ctr", "images", "push", "--plain-http", target)
            _copy(f"docker://{target}", f"oci:{directory / 'oci'}:latest")
            shutil.copytree(directory / "oci", kept.with_name(f"{kept.name}.new"), dirs_exist_ok=True)
        kept.with_name(f"{kept.name}.new").rename(kept)
    _copy(f"oci:{kept}:latest", f"docker://{registry}/{STARGZ.image}")


def _publish_soci(layout: Path, registry: str, scratch: Path) -> None:
    """The same layers, and an index of spans of 4 MiB."""
    with _directory(scratch / "soci") as directory:
        _run(None, "soci", "convert", "--standalone", "--format", "oci-dir", layout, directory / "oci")
        _copy(f"oci:{directory / 'oci'}", f"docker://{registry}/{SOCI.image}")


def _copy(source: str, destination: str) -> None:
    """An image with all that belongs to it, from or to a registry of plain HTTP."""
    plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    run("skopeo", "copy", "--quiet", "--all", *plain, source, destination)


class SnapshotterNode:
    """containerd and one snapshotter, all they keep below `directory`, running while the context is open."""

    def __init__(self, snapshotter: Snapshotter, directory: Path) -> None:
        self.snapshotter, self.directory = snapshotter, directory
        self.mount_point = directory / "mnt"
        self._stack = ExitStack()

    def __enter__(self) -> SnapshotterNode:
        self.mount_point.mkdir(parents=True)
        self._stack.callback(unmount_below, self.directory)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        settings, socket = self.directory / "snapshotter.toml", self.directory / "s.sock"
        settings.write_text(self.snapshotter.settings)
        fixed: list[str | Path] = ["--config", settings, "--root", self.directory / "snapshotter", "--address", socket]
        log = self.directory / "snapshotter.log"
        command: list[str | Path] = [program(self.snapshotter.daemon), *fixed, "--log-level", "warn"]
        self._stack.enter_context(_daemon(command, log, socket.exists))
        self._socket = self._stack.enter_context(_containerd(self.directory, self.snapshotter.name, socket))

    def mount(self, registry: str) -> None:
        """Pull lazily, and mount the image read-only at `mount_point`; RuntimeError if a layer was unpacked instead."""
        reference = f"{registry}/{self.snapshotter.image}"
        _run(self._socket, "ctr-remote", *self.snapshotter.pull, reference)
        fixed = ["images", "mount", "--snapshotter", self.snapshotter.name]
        _run(self._socket, "ctr", *fixed, reference, self.mount_point)
        layers = _layers(self.mount_point)
        if not all(layer.is_mount() for layer in layers):
            log = (self.directory / "snapshotter.log").read_text()
            raise RuntimeError(f"{self.snapshotter.title} unpacked a layer: {log[-2000:]}")


def commands(snapshotter: Snapshotter) -> list[str]:
    """What a reader would type."""
    reference = f"LINK/{snapshotter.image}"
    return [
        f"ctr-remote {' '.join(snapshotter.pull)} {reference}",
        f"ctr images mount --snapshotter {snapshotter.name} {reference} $W/mnt",
    ]


@contextmanager
def _directory(directory: Path) -> Iterator[Path]:
    """`directory`, made here and gone afterwards."""
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _containerd(directory: Path, snapshotter: str = "", address: Path = Path()) -> Iterator[Path]:
    """containerd with its state below `directory`; its socket."""
    socket, settings = directory / "c.sock", directory / "containerd.toml"
    disabled = ", ".join(f'"io.containerd.{plugin}"' for plugin in _UNUSED)
    lines = [
        "version = 3",
        f'root = "{directory}/root"',
        f'state = "{directory}/run"',
        f"disabled_plugins = [{disabled}]",
    ]
    lines += ["[grpc]", f'address = "{socket}"', "[debug]", 'level = "warn"']
    if snapshotter:
        lines += [f"[proxy_plugins.{snapshotter}]", 'type = "snapshot"', f'address = "{address}"']
    settings.write_text("\n".join(lines) + "\n")
    command: list[str | Path] = [program("containerd"), "--config", settings]
    with _daemon(command, directory / "containerd.log", lambda: _answers(socket)):
        yield socket


def _answers(socket: Path) -> bool:
    command: list[str | Path] = [program("ctr"), "--address", socket, "namespaces", "list"]
    return socket.exists() and not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode


@contextmanager
def _daemon(command: list[str | Path], log: Path, is_up: Callable[[], bool]) -> Iterator[None]:
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        end = time.monotonic() + STARTUP
        while not is_up():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{Path(command[0]).name} does not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _layers(overlay: Path) -> list[Path]:
    """The directories below an overlay mount."""
    (mount,) = (mount for mount in mountinfo("overlay") if mount.target == str(overlay))
    options = dict(option.partition("=")[::2] for option in mount.super_options.split(","))
    return [Path(name) for name in options["lowerdir"].split(":")]


def _run(socket: Path | None, name: str, *arguments: str | Path) -> None:
    """Run a client that must succeed, quietly."""
    environment = os.environ | ({"CONTAINERD_ADDRESS": str(socket)} if socket else {})
    command = [program(name), *arguments]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr[-2000:]}")
