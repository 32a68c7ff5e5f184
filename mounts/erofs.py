"""Mount EROFS: from files (file-backed) or from cachefiles objects (fsid)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mounts._kabi import lib
from mounts.syscalls import FsContext, fsopen, move_mount


def mount_erofs(
    source: str | Path,
    devices: Sequence[str | Path],
    options: Iterable[str],
    target: str | Path,
    *,
    attributes: int = lib.MOUNT_ATTR_RDONLY,
) -> None:
    """Mount EROFS at `target`, read-only.

    `source` is the metadata file, or "none" with `fsid=` among the options. `devices` are the blobs' files in the order
    of the device slots (with fsid: cookies, normally none, since the slot tags name them). An option is `key` or
    `key=value`. MountError says what the kernel said. Blocks until the kernel is done: on cachefiles that is after
    another thread has answered OPEN.
    """
    with fsopen("erofs") as context:
        configure(context, source, devices, options)
        context.create()
        fd = context.mount(attributes)
        try:
            move_mount(fd, target)
        finally:
            os.close(fd)


def configure(context: FsContext, source: str | Path, devices: Sequence[str | Path], options: Iterable[str]) -> None:
    """Hand source, options and devices to the kernel, one call each: no page limits their number."""
    context.set_string("source", source)
    for option in options:
        key, equals, value = option.partition("=")
        if equals:
            context.set_string(key, value)
        else:
            context.set_flag(key)
    for device in devices:
        context.set_string("device", device)
