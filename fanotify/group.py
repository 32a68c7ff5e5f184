"""A fanotify group for pre-content events: one thin wrapper per system call, raising OSError(errno, text, path)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fanotify._kabi import lib
from fanotify.wire import Event, pack_response, parse_events

PRE_ACCESS = lib.FAN_PRE_ACCESS
Q_OVERFLOW = lib.FAN_Q_OVERFLOW
# The only errnos that the kernel takes in a denial; through EROFS every reader sees EIO whichever it is.
DENY_ERRNOS = frozenset((errno.EPERM, errno.EIO, errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT))
# Without UNLIMITED_QUEUE an overflow lets readers through unanswered.
_FLAGS = (
    lib.FAN_CLASS_PRE_CONTENT | lib.FAN_CLOEXEC | lib.FAN_NONBLOCK | lib.FAN_UNLIMITED_QUEUE | lib.FAN_UNLIMITED_MARKS
    | lib.FAN_REPORT_TID
)  # fmt: skip
_READ_SIZE = 48 * 64


def init() -> int:
    """Make a group and return its descriptor: pre-content class, non-blocking, without queue and mark limits.

    Its events name threads, not processes.

    ENOSYS or EINVAL: this kernel has no permission events (CONFIG_FANOTIFY_ACCESS_PERMISSIONS).
    """
    event_flags = os.O_RDONLY | os.O_LARGEFILE | os.O_CLOEXEC
    group = lib.eod_fanotify_init(_FLAGS | lib.FAN_REPORT_FD_ERROR, event_flags)
    if group == -errno.EINVAL:  # before 6.13
        group = lib.eod_fanotify_init(_FLAGS, event_flags)
    if group < 0:
        raise OSError(-group, f"fanotify_init: {os.strerror(-group)}")
    return group


def mark(group: int, path: str | Path) -> None:
    """Ask for FAN_PRE_ACCESS of one inode. EINVAL: kernel before 6.14; EOPNOTSUPP: not on this file system."""
    _check(lib.eod_fanotify_mark(group, lib.FAN_MARK_ADD, PRE_ACCESS, os.fsencode(path)), "fanotify_mark", path)


def mark_fd(group: int, fd: int) -> None:
    """The same for the inode of a descriptor, which need not have a name any more."""
    _check(lib.eod_fanotify_mark_fd(group, lib.FAN_MARK_ADD, PRE_ACCESS, fd), "fanotify_mark", f"descriptor {fd}")


def unmark_fd(group: int, fd: int) -> None:
    """Stop asking: from here on the kernel reads the file, holes and all, without a question. ENOENT: no mark."""
    result = lib.eod_fanotify_mark_fd(group, lib.FAN_MARK_REMOVE, PRE_ACCESS, fd)
    _check(result, "fanotify_mark (remove)", f"descriptor {fd}")


def read_events(group: int) -> list[Event]:
    """The events that wait, as many as one read(2) gives; none when there are none.

    Each event's descriptor is the caller's to close, after the answer. OSError from read(2) means that the first event
    could not be handed over (the kernel has denied it).
    """
    try:
        return list(parse_events(os.read(group, _READ_SIZE)))
    except BlockingIOError:
        return []


def answer(group: int, fd: int, denial: int = 0) -> None:
    """Answer the event that came with number `fd`: allow, or deny with an errno (of DENY_ERRNOS; others become EIO).

    OSError ENOENT: no unanswered event has this number.
    """
    if denial and denial not in DENY_ERRNOS:
        denial = errno.EIO
    os.write(group, pack_response(fd, denial))


def _check(result: int, call: str, path: str | Path) -> None:
    if result < 0:
        raise OSError(-result, f"{call}: {os.strerror(-result)}", str(path))
