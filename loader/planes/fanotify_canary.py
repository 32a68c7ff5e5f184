"""The canary on the fanotify plane: a sparse blob behind a mark, mounted from files."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from select import select

import fanotify
from loader.planes.canary import CanaryImage, check_reads, step
from mounts import mount_erofs, umount2
from mounts.syscalls import MNT_DETACH

_ALIGNMENT = 65536


def run(directory: Path, image: CanaryImage) -> None:
    """Mount and read the image in `directory`, empty, on the cache's file system; CanaryFailed says what broke."""
    metadata, blob, target = directory / "metadata", directory / "blob", directory / "mnt"
    metadata.write_bytes(image.metadata)
    blob.touch()
    os.truncate(blob, len(image.data) + -len(image.data) % _ALIGNMENT)
    target.mkdir()
    with contextlib.ExitStack() as cleanup:
        writer = os.open(blob, os.O_RDWR | os.O_CLOEXEC)
        cleanup.callback(os.close, writer)
        with step("group"):
            group = fanotify.init()
        cleanup.callback(os.close, group)
        with step("mark"):
            fanotify.mark_fd(group, writer)
        with step("mount"):
            mount_erofs(metadata, [blob], image.options, target)
        cleanup.callback(umount2, target, MNT_DETACH)
        check_reads(image, target, lambda refuse: _serve(group, writer, image.data, refuse))


def _serve(group: int, writer: int, data: bytes, refuse: bool) -> bool:
    """Answer the events of the next moment; whether there were any."""
    if not select([group], [], [], 0.02)[0]:
        return False
    events = fanotify.read_events(group)
    for event in events:
        if event.fd < 0:
            continue
        if not refuse:
            start = event.offset or 0
            end = len(data) if event.length is None else start + event.length
            os.pwrite(writer, data[start:end], start)
        fanotify.answer(group, event.fd, errno.EIO if refuse else 0)
        os.close(event.fd)
    return bool(events)
