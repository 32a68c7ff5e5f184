"""Leaving in order: the worker first, then what waits, then the mounts; no reader is left stuck, none gets zeros."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

from loader.keeper import fence
from loader.keeper.config import STORED_ENV
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.state import Object

if TYPE_CHECKING:
    from loader.keeper.keeper import Keeper

log = logging.getLogger(__name__)
_PAUSE = 0.5  # seconds before another try
_PATIENCE = 10.0  # seconds that a worker has to leave


class Leaving:
    """Steps of a keeper that leaves; `step` is called from its loop until `done`."""

    def __init__(self, keeper: Keeper, mode: str) -> None:
        self._keeper, self._mode = keeper, mode
        self._kill_at = time.monotonic() + _PATIENCE
        self._unmounting: list[str] | None = None
        self._again_at = 0.0  # what found no room for a thread is tried again
        self._unfenced = set[int]()  # objects that nobody but us guards
        self.done = False
        keeper.drop_standby()
        if keeper.worker is not None:
            keeper.worker.signal(signal.SIGTERM)

    @property
    def refuses(self) -> bool:
        """Whether what the kernel asks now gets no worker any more; else it waits for the next daemon."""
        return self._mode == "umount" and self._keeper.worker is None

    def step(self) -> None:
        keeper = self._keeper
        if keeper.worker is not None:
            if time.monotonic() > self._kill_at:
                keeper.worker.signal(signal.SIGKILL)
            return
        keeper.nursery.close()
        if self._mode == "umount":
            keeper.fail_all()
        if keeper.background.running:
            keeper.fail_openings()
            return
        if time.monotonic() < self._again_at:
            return
        if self._mode == "umount" and self._unmount_next():
            return
        unguarded = self._unguarded()
        if self._unfenced or self._mode == "keep" and (unguarded or self._dies_with_us() or self._would_fail()):
            log.warning("incomplete images stay mounted: staying too, to refuse what is missing")
            keeper.state.save()  # in one file: who takes over may be an older version
            keeper.park()
            self.done = True  # the state is another keeper's now
            return
        if unguarded:
            self._fence(unguarded)
            return
        if not os.environ.get(STORED_ENV):  # else they wait for the keeper that gets the descriptors back
            keeper.fail_all()
        self._forget_unused()
        self.done = True

    def _dies_with_us(self) -> bool:
        """Whether mounts would never heal once the last descriptor is closed: those of cachefiles."""
        return self._keeper.plane.name == "cachefiles" and bool(self._keeper.state.objects)

    def _would_fail(self) -> bool:
        """Whether readers would get errors until the next daemon starts. (Under systemd they wait for it anyway.)"""
        if os.environ.get(STORED_ENV):
            return False
        state = self._keeper.state
        state.drop_gone_mounts(self._keeper.host.erofs_targets())
        used = {number for record in state.mounts.values() for number in record.objects}
        return any(not item.complete for number, item in state.objects.items() if number in used)

    def _unguarded(self) -> list[Object]:
        return [item for item in self._keeper.state.objects.values() if item.mounted and item.holes_read_as_zeros]

    def _unmount_next(self) -> bool:
        """Start to unmount one more; false when all were tried."""
        if self._unmounting is None:
            self._unmounting = list(self._keeper.state.mounts)
        unmounting = self._unmounting
        if not unmounting:
            return False
        target = unmounting.pop()

        def ended(failure: OSError | None) -> None:
            if failure is not None and failure.errno == errno.EBUSY:
                log.warning("%s is busy: unmounted lazily; what is missing in it will be errors", target)
                self._keeper.mounter.umount({"target": target, "lazy": True}, lambda failure: None)
            elif failure is not None and self._is_for_later(failure):
                unmounting.append(target)
            elif failure is not None:
                log.error("%s", failure)

        self._keeper.mounter.umount({"target": target}, ended)
        return True

    def _fence(self, unguarded: list[Object]) -> None:
        """Truncate in a thread, while the loop still answers: a truncation is an event of our own group."""
        keeper = self._keeper
        if isinstance(keeper.plane, FanotifyPlane):
            keeper.plane.fencing = True

        def ended(failure: OSError | None) -> None:
            if failure is not None:
                log.error("fence: %s", failure)
                if self._is_for_later(failure):
                    return
                self._unfenced.update(item.id for item in unguarded)
            for item in unguarded:
                item.mounted = item.id in self._unfenced
            keeper.state.save()

        keeper.background.run(lambda: self._unfenced.update(fence.truncate(unguarded)), ended)

    def _is_for_later(self, failure: OSError) -> bool:
        """Whether there was only no room for a thread; then the next step waits a moment."""
        if failure.errno != errno.EAGAIN:
            return False
        self._again_at = time.monotonic() + _PAUSE
        return True

    def _forget_unused(self) -> None:
        """Leave no record of objects that nothing uses: a start after this one must not fence them."""
        state = self._keeper.state
        used = {number for record in state.mounts.values() for number in record.objects}
        for number in set(state.objects) - used:
            del state.objects[number]
        state.save()
