"""The canary on the fanotify plane: a sparse blob behind a mark, mounted from files."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fanotify
from loader.keeper.readable import readable
from loader.planes.canary import CanaryImage, check_reads, check_sharing, step
from mounts import mount_erofs, umount2
from mounts.syscalls import MNT_DETACH

_ALIGNMENT = 65536
Serve = Callable[[bool], bool]
Mount = Callable[[str, Sequence[str]], Path]  # a name, more options → where it is mounted


def run(directory: Path, image: CanaryImage) -> None:
    """Mount and read the image in `directory`, empty, on the cache's file system; CanaryFailed says what broke."""
    with _prepared(directory, image, image.metadata) as (mount, serve):
        with step("mount"):
            target = mount("mnt", ())
        check_reads(image, target, serve)


def run_sharing(directory: Path, image: CanaryImage) -> None:
    """Mount the image three times, two of them in one domain; CanaryFailed unless those two alone share page cache."""
    with _prepared(directory, image, image.announced) as (mount, serve):
        with step("share"):
            first, second, other = (
                mount(f"mnt-{number}", ("inode_share", f"domain_id={directory.name}-{domain}"))
                for number, domain in enumerate(("one", "one", "other"))
            )
        check_sharing(image, (first, second, other), serve)


@contextlib.contextmanager
def _prepared(directory: Path, image: CanaryImage, content: bytes) -> Iterator[tuple[Mount, Serve]]:
    metadata, blob = directory / "metadata", directory / "blob"
    metadata.write_bytes(content)
    blob.touch()
    os.truncate(blob, len(image.data) + -len(image.data) % _ALIGNMENT)
    with contextlib.ExitStack() as cleanup:
        writer = os.open(blob, os.O_RDWR | os.O_CLOEXEC)
        cleanup.callback(os.close, writer)
        with step("group"):
            group = fanotify.init()
        cleanup.callback(os.close, group)
        with step("mark"):
            fanotify.mark_fd(group, writer)

        def mount(name: str, options: Sequence[str]) -> Path:
            target = directory / name
            target.mkdir()
            mount_erofs(metadata, [blob], [*image.options, *options], target)
            cleanup.callback(umount2, target, MNT_DETACH)
            return target

        yield mount, lambda refuse: _serve(group, writer, image.data, refuse)


def _serve(group: int, writer: int, data: bytes, refuse: bool) -> bool:
    """Answer the events of the next moment; whether there were any."""
    if not readable([group], 0.02):
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
