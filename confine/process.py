"""One function a kernel feature, each raising OSError(errno, text)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from confine._kabi import lib

_OLDEST_ABI = 2  # the first Landlock that lets files be renamed from one directory into another


def drop_capabilities() -> None:
    """Give up every capability, and the means to get one back: not even a set-user-id program helps."""
    _check(lib.eod_no_new_privs(), "no_new_privs")
    _check(lib.eod_drop_capabilities(), "capset")


def restrict_writes(directories: Iterable[Path]) -> int:
    """Landlock: write, make, rename and remove only below `directories` and in /dev/null; no symlinks, no devices.

    What is open stays writable. From ABI 6 on, other processes' signals and abstract Unix sockets are out of reach too.
    Returns the ABI; 0 where the kernel has no Landlock, or one that is too old, and nothing was restricted.
    """
    abi = lib.eod_landlock_abi()
    if abi in (-errno.ENOSYS, -errno.EOPNOTSUPP) or 0 <= abi < _OLDEST_ABI:
        return 0
    _check(abi, "landlock")
    ruleset = _check(lib.eod_landlock_create(abi), "landlock_create_ruleset")
    try:
        for directory in directories:
            _allow(directory, lambda fd: lib.eod_landlock_allow_writes(ruleset, abi, fd))
        _allow(Path(os.devnull), lambda fd: lib.eod_landlock_allow_file_writes(ruleset, fd))
        _check(lib.eod_landlock_restrict(ruleset), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return abi


def filter_system_calls() -> None:
    """seccomp: files, memory, threads, Internet sockets; see csrc/seccomp.c for the list. Needs `drop_capabilities`."""
    _check(lib.eod_filter_system_calls(), "seccomp")


def _allow(path: Path, add: Callable[[int], int]) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _check(add(fd), str(path))
    finally:
        os.close(fd)


def _check(value: int, what: str) -> int:
    if value < 0:
        raise OSError(-value, f"{what}: {os.strerror(-value)}")
    return value
