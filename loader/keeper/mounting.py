"""Mounts and unmounts, each in a thread of its own: on cachefiles they wait for answers that the main loop gives."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loader.keeper.bounds import check_mount
from loader.keeper.host import Host, start_thread
from loader.keeper.state import MountRecord, State
from mounts import mount_erofs, umount2
from mounts.readahead import backing_devices, get_readahead, restore_readahead, set_readahead
from mounts.syscalls import MNT_DETACH

log = logging.getLogger(__name__)
Done = Callable[[OSError | None], object]


class Background:
    """Runs system calls in threads; `wake` becomes readable when one has ended, and `finish` then calls back."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended: queue.SimpleQueue[tuple[Done, OSError | None]] = queue.SimpleQueue()
        self.running = 0

    def run(self, call: Callable[[], None], done: Done) -> None:
        """Run `call` among the machine's mounts; `done` gets its error, or None, in the thread that calls `finish`.

        Its error is EAGAIN where there is no room for a thread.
        """

        def ended(failure: OSError | None) -> None:
            self.running -= 1
            done(failure)

        self.running += 1
        try:
            start_thread(partial(self._body, call, ended))
        except OSError as error:
            self._end(ended, error)

    def later(self, seconds: float, call: Callable[[], None], done: Done) -> None:
        """The same in a while, unless this process has left by then: nobody waits for it. OSError: no room."""
        timer = threading.Timer(seconds, self._body, (call, done))
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None

    def _body(self, call: Callable[[], None], done: Done) -> None:
        failure: OSError | None = None
        try:
            self._host.enter()
            call()
        except OSError as error:
            failure = error
        except Exception as error:
            failure = OSError(errno.EINVAL, repr(error))
        self._end(done, failure)

    def _end(self, done: Done, failure: OSError | None) -> None:
        self._ended.put((done, failure))
        os.eventfd_write(self.wake, 1)

    def finish(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        while not self._ended.empty():
            done, failure = self._ended.get()
            done(failure)


class Mounter:
    """The mounts of this daemon, recorded before they are made, so that one made in the last moment is not lost."""

    def __init__(self, state: State, background: Background, host: Host, plane: str) -> None:
        self._state, self._background, self._host, self._plane = state, background, host, plane
        self._under_way: set[str] = set()

    def mount(self, arguments: dict[str, Any], done: Done) -> None:
        """See protocol.CALLS["mount"]."""
        record = MountRecord(
            target=str(arguments["target"]),
            plane=self._plane,
            source=str(arguments.get("source") or "none"),
            fsid=str(arguments.get("fsid") or ""),
            domain_id=str(arguments.get("domain_id") or ""),
            objects=[int(number) for number in arguments.get("objects") or []],
        )
        unknown = [number for number in record.objects if number not in self._state.objects]
        if unknown:
            raise OSError(errno.ENOENT, f"no object {unknown[0]}", record.target)
        if record.target in self._state.mounts:
            raise OSError(errno.EBUSY, "already mounted by this daemon", record.target)
        devices = [str(device) for device in arguments.get("devices") or []]
        options = [str(option) for option in arguments.get("options") or []]
        pause = float(arguments.get("pause") or 0)
        known = [self._state.objects[number].path for number in record.objects]
        check_mount(self._state.path.parent, record.source, devices, options, known)
        options += [
            f"{key}={value}" for key, value in (("fsid", record.fsid), ("domain_id", record.domain_id)) if value
        ]
        self._state.mounts[record.target] = record
        for number in record.objects:
            self._state.objects[number].mounted = True
            if "directio" in options:  # a thread does not wait for such reads
                self._state.objects[number].readers_unknown = True
        try:
            self._state.save_added([self._state.objects[number] for number in record.objects], [record])
        except OSError:
            del self._state.mounts[record.target]
            raise
        self._under_way.add(record.target)
        new: set[str] = set()

        def ended(failure: OSError | None) -> None:
            self._under_way.discard(record.target)
            fenced = [item for item in self._state.fenced if item["target"] != record.target]
            if failure is not None:
                self._state.mounts.pop(record.target, None)
                self._state.save()
            elif len(fenced) != len(self._state.fenced):
                self._state.fenced = fenced
                self._state.save()
            if failure is None and len(new) == 1:
                self._pause_readahead(new.pop(), pause)
            done(failure)

        def mount() -> None:
            if not Path(record.target).is_dir():
                raise OSError(errno.ENOTDIR, "not a directory; create it first", record.target)
            before = backing_devices() if pause > 0 else set()
            mount_erofs(record.source, devices, options, record.target)
            if pause > 0:
                new.update(backing_devices() - before)

        self._background.run(mount, ended)

    def _pause_readahead(self, device: str, seconds: float) -> None:
        """Stop readahead on a file system that was just mounted, for a while; which costs speed if it fails.

        What a start reads is fetched by a list, and what the kernel would read around that is not in it. With two new
        file systems, one of somebody else's, nothing is known. It is recorded first, for whoever takes over meanwhile.
        """
        with contextlib.suppress(OSError, ValueError):
            kib = get_readahead(device)
            self._background.later(
                seconds, partial(restore_readahead, device, kib), lambda _failure: self._state.paused.pop(device, None)
            )
            self._state.paused[device] = kib
            self._state.save_added([])
            self._host.call(partial(set_readahead, device, 0))

    def resume_readahead(self) -> None:
        """Give back what an earlier keeper took, and died before it gave it back."""
        for device, kib in list(self._state.paused.items()):
            with contextlib.suppress(OSError):  # no room for a thread: then the next keeper does
                self._host.call(partial(restore_readahead, device, kib))
                del self._state.paused[device]

    def umount(self, arguments: dict[str, Any], done: Done) -> None:
        """See protocol.CALLS["umount"]."""
        target = str(arguments["target"])
        flags = MNT_DETACH if arguments.get("lazy") else 0
        record = self._state.mounts.get(target)

        def ended(failure: OSError | None) -> None:
            if failure is None or failure.errno == errno.EINVAL:  # EINVAL: not a mount point (any more)
                self.refresh()
            if failure is None and not flags and record is not None:
                self._forget_users(record)
            done(failure)

        self._background.run(lambda: umount2(target, flags), ended)

    def _forget_users(self, record: MountRecord) -> None:
        """After a mount ended for good: its objects are open in the kernel no more, but for other mounts' use."""
        used = {number for other in self._state.mounts.values() for number in other.objects}
        for number in set(record.objects) - used:
            if number in self._state.objects:
                self._state.objects[number].mounted = False
        self._state.save()

    def refresh(self) -> None:
        """Forget the mounts that are gone, whoever unmounted them. If they cannot be seen now, the next time."""
        before = len(self._state.mounts)
        try:
            self._state.drop_gone_mounts(self._host.erofs_targets() | self._under_way)
        except OSError as error:
            log.error("the machine's mounts: %s", error)
        if len(self._state.mounts) != before:
            self._state.save()
