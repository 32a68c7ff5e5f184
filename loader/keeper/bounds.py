"""How far a worker's calls reach. It may have been taken over by what it parsed, and the keeper has all rights."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePath

# What changes how an image is mounted; not what is mounted: `device` would put any file of the machine into an image.
MOUNT_OPTIONS = frozenset(("cache_strategy", "inode_share", "user_xattr", "nouser_xattr", "acl", "noacl", "directio"))


def open_below(directory: Path, path: str, flags: int) -> int:
    """Open a regular file below `directory`, with no symlink on the way; EPERM for anything else."""
    try:
        parts = PurePath(path).relative_to(directory).parts
    except ValueError:
        raise OSError(errno.EPERM, f"not below {directory}", path) from None
    if not parts or ".." in parts:
        raise OSError(errno.EPERM, f"not below {directory}", path)
    with contextlib.ExitStack() as stack:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, at)
        for name in parts[:-1]:
            at = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            stack.callback(os.close, at)
        fd = os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EPERM, "not a regular file", path)
    return fd


def check_mount(root: Path, source: str, devices: Iterable[str], options: Iterable[str], known: Iterable[str]) -> None:
    """EPERM unless a mount reads only metadata that is stored under `root` and cache files that are `known`."""
    if source != "none":
        os.close(open_below(root / "images", source, os.O_RDONLY))
    if unknown := set(devices) - set(known):
        raise OSError(errno.EPERM, "not one of the mount's objects", unknown.pop())
    for option in options:
        if option.partition("=")[0] not in MOUNT_OPTIONS:
            raise OSError(errno.EPERM, f"option {option!r}")
