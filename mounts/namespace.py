"""Another mount namespace than the process's own, for one thread: setns(2)."""

from __future__ import annotations

import os

from mounts._kabi import lib


def is_mount_namespace(fd: int) -> bool:
    """Whether the descriptor is one of a mount namespace (/proc/PID/ns/mnt)."""
    return bool(lib.eod_is_mount_namespace(fd))


def enter_mount_namespace(fd: int) -> None:
    """Have the calling thread, and no other, see and change the mounts of that namespace from here on.

    Its root and working directory become the namespace's root. Takes CAP_SYS_ADMIN and CAP_SYS_CHROOT.
    """
    result = lib.eod_enter_mount_namespace(fd)
    if result < 0:
        raise OSError(-result, f"setns: {os.strerror(-result)}")
