"""Fencing: what must happen first when every process of the loader had died at once.

The kernel answers a closed fanotify group's questions with "allow", and a sparse decoded cache file then reads as
zeros, which EROFS keeps as good pages. Such mounts are never served again: their incomplete files lose their length
(beyond the end of its device EROFS reads an error) and their name, so that a new mount starts from new ones; then the
mounts go and the page cache is dropped. In the encoded form a hole does not decode: those mounts just go on. cachefiles
fails closed by itself, but its mounts do not heal either.

What fails of that keeps nothing else from being done, and no daemon from starting. A file that cannot be truncated is
marked again, and what is asked of it denied.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from loader.keeper.host import Host
from loader.keeper.state import MountRecord, Object, State
from mounts import umount2
from mounts.syscalls import MNT_DETACH

log = logging.getLogger(__name__)
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_REASON = "every process of the loader had died; what was read since cannot be trusted"
_PAGES_STAY = "; the page cache could not be dropped: end what still has files of it open"


def fence_unguarded(state: State, host: Host) -> None:
    """Fence everything that the state of this boot says was left without a guard, and record it. Saves the state."""
    state.drop_gone_mounts(host.erofs_targets())
    unguarded = [item for item in state.objects.values() if item.holes_read_as_zeros]
    failed = truncate(unguarded)
    numbers, earlier = {item.id for item in unguarded}, len(state.fenced)
    for record in list(state.mounts.values()):
        if record.plane == "cachefiles" or numbers & set(record.objects):
            take_away(state, host, record, _REASON)
    if unguarded and not _drop_caches(host):
        for entry in state.fenced[earlier:]:
            entry["reason"] += _PAGES_STAY
    for item in list(state.objects.values()):
        if item.id in failed:  # who still has it open is guarded from here on: nothing is served to him
            item.mounted = item.released = True
        elif item.id in numbers or item.plane == "cachefiles":
            del state.objects[item.id]
    state.save()


def truncate(objects: Iterable[Object]) -> set[int]:
    """Make reads of the objects' files errors, for whoever has them open, and free their names; with which that failed.

    Such a file keeps its name: without it, it could not be marked again.
    """
    failed = set()
    for item in objects:
        try:
            os.truncate(item.path, 0)
            Path(item.path).unlink()
            log.warning("fenced %s", item.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.error("cannot fence %s: %s; it has to be removed before it is mounted again", item.path, error.strerror)
            failed.add(item.id)
    return failed


def _drop_caches(host: Host) -> bool:
    try:
        host.call(lambda: _DROP_CACHES.write_text("3\n"))  # a unit's own /proc/sys is read-only
    except OSError as error:
        log.error("cannot drop the page cache: %s", error)
        return False
    return True


def take_away(state: State, host: Host, record: MountRecord, reason: str) -> None:
    """Unmount lazily and record why. A mount that cannot go stays on record."""
    try:
        host.call(lambda: umount2(record.target, MNT_DETACH))
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: nothing is mounted there any more
            log.error("cannot fence the mount at %s: %s", record.target, error)
            return
    state.mounts.pop(record.target, None)
    state.fenced.append({"target": record.target, "plane": record.plane, "source": record.source, "reason": reason})
    log.error("fenced the mount at %s: %s", record.target, reason)
