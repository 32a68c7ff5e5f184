"""What the sizes in erofs_builder/kinds.py cost and save: python -m bench.frames (as root).

The Debian test image is built, mounted complete in the encoded form, and the application started from it, while a
fanotify group writes down what the kernel asks for. A frame counts once it is asked for, whole, as a node fetches it.
Change a size, run again, compare.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import table
from bench.workload import start_application
from erofs_builder.erofs.writer import write_metadata
from erofs_builder.kinds import KINDS, classify
from erofs_builder.layer import Layer, build_layer
from erofs_builder.model import Blob, Node
from erofs_builder.payload import Form
from erofs_builder.tree import flatten, walk
from fanotify import group as fanotify
from mounts import mount_erofs, umount2
from tests.images import catalog
from tests.images.layout import Layout

Asked = tuple[str, int, int]  # file, offset, length


def main() -> None:
    """Build, mount, start, and print a row for each kind of file."""
    with tempfile.TemporaryDirectory(prefix="erofs-frames-", dir="/var/tmp") as name:
        scratch = Path(name)
        layers = _build(scratch)
        root = flatten(layers)
        metadata = write_metadata(root, Form.ENCODED, [layer.blob for layer in layers if layer.blob])
        (scratch / "metadata").write_bytes(metadata.erofs)
        files = {blob: scratch / blob.digest.hex for blob in metadata.blobs}
        with _asked(list(files.values())) as asked:
            mount_erofs(scratch / "metadata", list(files.values()), ["cache_strategy=disabled"], _made(scratch / "mnt"))
            try:
                start_application(scratch / "mnt")
            finally:
                umount2(scratch / "mnt")
        _print(root, {str(file): blob for blob, file in files.items()}, asked)


def _build(scratch: Path) -> list[Layer]:
    layout = Layout(catalog.image("debian-plain") / "oci")
    layers = []
    for number, descriptor in enumerate(layout.manifest("latest")["layers"]):
        part = scratch / f"{number}.part"
        with open(layout.blob_path(descriptor["digest"]), "rb") as tar, open(part, "wb") as out:
            layers.append(build_layer(tar, out))
        if blob := layers[-1].blob:
            part.rename(scratch / blob.digest.hex)
    return layers


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@contextmanager
def _asked(files: Sequence[Path]) -> Iterator[list[Asked]]:
    """Let every access through and note it."""
    group, stop, asked = fanotify.init(), threading.Event(), list[Asked]()
    for file in files:
        fanotify.mark(group, file)

    def answer() -> None:
        while not stop.is_set():
            if not select.select([group], [], [], 0.1)[0]:
                continue
            for event in fanotify.read_events(group):
                file = os.readlink(f"/proc/self/fd/{event.fd}")  # noqa: PTH115
                asked.append((file, event.offset or 0, event.length or 0))
                fanotify.answer(group, event.fd)
                os.close(event.fd)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield asked
    finally:
        stop.set()
        thread.join()
        os.close(group)


def _print(root: Node, blobs: dict[str, Blob], asked: Sequence[Asked]) -> None:
    touched: set[tuple[Blob, int]] = set()
    for file, offset, length in asked:
        blob = blobs[file]
        assert blob.table is not None
        touched |= {(blob, frame) for frame in blob.table.covering(offset, length, decoded=False)}
    kinds: dict[tuple[Blob, int], str] = {}
    for path, node in walk(root):
        for extent in node.extents:
            if extent.blob is not None:
                kinds.setdefault((extent.blob, extent.frame), _kind(path))
    all_of, all_frames, started, started_frames = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for (blob, frame), kind in kinds.items():
        assert blob.table is not None
        size = blob.table[frame].encoded_size
        all_of[kind] += size
        all_frames[kind] += 1
        if (blob, frame) in touched:
            started[kind] += size
            started_frames[kind] += 1
    rows = [
        [
            kind.name,
            f"{kind.piece >> 10} / {kind.bin >> 10}",
            table.megabytes(all_of[kind.name]),
            str(all_frames[kind.name]),
            table.megabytes(started[kind.name]),
            str(started_frames[kind.name]),
        ]
        for kind in KINDS
    ]
    rows.append(
        [
            "all",
            "",
            table.megabytes(all_of.total()),
            str(all_frames.total()),
            table.megabytes(started.total()),
            str(started_frames.total()),
        ]
    )
    print(table.render(["kind", "piece / bin KiB", "blob MB", "frames", "start MB", "frames"], rows))
    print(f"{len(asked)} events")


def _kind(path: bytes) -> str:
    """The kind by name alone: near enough for a table."""
    return classify(path, b"\x7fELF" if b".so" in path or b"/bin/" in path or b"/lib/gcc" in path else b"", 0).name


if __name__ == "__main__":
    main()
