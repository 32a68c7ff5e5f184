"""One wrapper per system call, each raising OSError(errno, text, path). All of them release the GIL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mounts._kabi import lib

MNT_DETACH = lib.MNT_DETACH
_MAX_LOG_LINES = 64


class MountError(OSError):
    """A mount that failed; `log` has what the file system itself said about it (may be empty)."""

    log: tuple[str, ...] = ()


class FsContext:
    """A file system that is being configured: fsopen(2) and what follows it."""

    def __init__(self, fstype: str) -> None:
        self.fstype = fstype
        self.fd = lib.eod_fsopen(os.fsencode(fstype), lib.FSOPEN_CLOEXEC)
        if self.fd < 0:
            raise _error(self.fd, "fsopen", fstype)

    def set_string(self, key: str, value: str | Path) -> None:
        self._check(lib.eod_fsconfig_string(self.fd, os.fsencode(key), os.fsencode(value)), f"{key}={value}")

    def set_flag(self, key: str) -> None:
        self._check(lib.eod_fsconfig_flag(self.fd, os.fsencode(key)), key)

    def create(self) -> None:
        """Make the superblock: this opens the devices, and on cachefiles waits until OPEN is answered."""
        self._check(lib.eod_fsconfig_create(self.fd), "create superblock")

    def mount(self, attributes: int) -> int:
        """A descriptor of the new, not yet attached mount."""
        fd = lib.eod_fsmount(self.fd, lib.FSMOUNT_CLOEXEC, attributes)
        self._check(fd, "fsmount")
        return fd

    def messages(self) -> tuple[str, ...]:
        """The messages that the kernel has left for this context, oldest first."""
        lines: list[str] = []
        with contextlib.suppress(OSError):  # ENODATA: no more
            while len(lines) < _MAX_LOG_LINES:
                lines.append(os.read(self.fd, 4096).decode(errors="replace").strip())
        return tuple(lines)

    def close(self) -> None:
        os.close(self.fd)

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            log = self.messages()
            text = f"{self.fstype}: {what}: {os.strerror(-result)}" + "".join(f"; {line}" for line in log)
            error = MountError(-result, text)
            error.log = log
            raise error


@contextlib.contextmanager
def fsopen(fstype: str) -> Iterator[FsContext]:
    """An FsContext that is closed at the end."""
    context = FsContext(fstype)
    try:
        yield context
    finally:
        context.close()


def move_mount(fd: int, target: str | Path) -> None:
    """Attach the mount of a descriptor at `target`."""
    result = lib.eod_move_mount(fd, os.fsencode(target))
    if result < 0:
        raise _error(result, "move_mount", target)


def umount2(target: str | Path, flags: int = 0) -> None:
    """Unmount; `flags` MNT_DETACH does it lazily. A symlink is not followed."""
    result = lib.eod_umount2(os.fsencode(target), flags | lib.UMOUNT_NOFOLLOW)
    if result < 0:
        raise _error(result, "umount", target)


def _error(result: int, call: str, path: str | Path) -> OSError:
    return OSError(-result, f"{call}: {os.strerror(-result)}", str(path))
