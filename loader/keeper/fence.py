"""Fencing: what must happen first when every process of the loader had died at once.

The kernel answers a closed fanotify group's questions with "allow", and a sparse decoded cache file then reads as
zeros, which EROFS keeps as good pages. Such mounts are never served again: their incomplete files lose their length
(beyond the end of its device EROFS reads an error) and their name, so that a new mount starts from new ones; then the
mounts go and the page cache is dropped. In the encoded form a hole does not decode: those mounts just go on. cachefiles
fails closed by itself, but its mounts do not heal either.
"""

from __future__ import annotations

import contextlib
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


def fence_unguarded(state: State, host: Host) -> None:
    """Fence everything that the state of this boot says was left without a guard, and record it. Saves the state."""
    state.drop_gone_mounts(host.erofs_targets())
    unguarded = [item for item in state.objects.values() if item.holes_read_as_zeros]
    truncate(unguarded)
    numbers = {item.id for item in unguarded}
    for record in list(state.mounts.values()):
        if record.plane == "cachefiles" or numbers & set(record.objects):
            take_away(state, host, record, _REASON)
    if unguarded:
        host.call(lambda: _DROP_CACHES.write_text("3\n"))  # a unit's own /proc/sys is read-only
    for item in list(state.objects.values()):
        if item.id in numbers or item.plane == "cachefiles":
            del state.objects[item.id]
    state.save()


def truncate(objects: Iterable[Object]) -> None:
    """Make reads of the objects' files errors, for whoever has them open, and free their names."""
    for item in objects:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(item.path, 0)
            Path(item.path).unlink()
            log.warning("fenced %s", item.path)


def take_away(state: State, host: Host, record: MountRecord, reason: str) -> None:
    """Unmount lazily and record why."""
    try:
        host.call(lambda: umount2(record.target, MNT_DETACH))
    except OSError as error:
        log.error("fence: %s", error)
    state.mounts.pop(record.target, None)
    state.fenced.append({"target": record.target, "plane": record.plane, "source": record.source, "reason": reason})
    log.error("fenced the mount at %s: %s", record.target, reason)
