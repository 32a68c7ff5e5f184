"""The cachefiles plane of the keeper: the device, the objects' anonymous descriptors, and the messages."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

import cachefiles
from loader.keeper.bounds import open_below
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import FdStore
from loader.keeper.requests import Pending, RequestTable
from loader.keeper.state import Object, State

log = logging.getLogger(__name__)
DEVICE = "device"
_BATCH = 64


class CachefilesPlane:
    """The device is single-opener: it is bound once and then lives in the descriptor store.

    A keeper that takes over writes `restore`, and the kernel sends every unanswered request again.
    """

    name = "cachefiles"

    def __init__(
        self, config: KeeperConfig, store: FdStore, state: State, requests: RequestTable, fds: dict[str, int]
    ) -> None:
        self._store, self._state, self._requests = store, state, requests
        self.counters = {"opens": 0, "reads": 0, "closes": 0, "refused": 0, "withdrawn": 0}
        self.writers: dict[int, int] = {}
        self._by_kernel_id: dict[int, int] = {}
        self.directory = config.cachefiles_dir or config.root / "cachefiles"
        device = fds.pop(DEVICE, None)
        if device is None:
            self.device = self._bind(config)
        else:
            self.device = device
            self._reattach(fds)
            self._restore()

    def fileno(self) -> int:
        return self.device

    def handed_down(self) -> dict[str, int]:
        """What another keeper needs to go on, by the names it looks for."""
        return {DEVICE: self.device} | self._state.writers_by_name(self.writers)

    def _bind(self, config: KeeperConfig) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        device = cachefiles.open_device()
        try:
            cachefiles.bind(device, self.directory, config.cachefiles_tag, config.cachefiles_limits)
            self._store.store(DEVICE, device)
        except BaseException:
            os.close(device)
            raise
        return device

    def _restore(self) -> None:
        try:
            cachefiles.restore(self.device)
        except OSError as error:
            log.error("requests in flight when the last keeper died are lost on this kernel: %s", error)

    def _reattach(self, fds: dict[str, int]) -> None:
        """Objects whose descriptor survived; the kernel opens the others anew when it reads them."""
        for item in [item for item in self._state.objects.values() if item.plane == self.name]:
            writer = fds.get(item.store_name)
            if writer is None or not item.open:  # the descriptor of an unanswered OPEN comes again with its OPEN
                del self._state.objects[item.id]
            else:
                del fds[item.store_name]
                self.writers[item.id] = writer
                self._by_kernel_id[item.kernel_id] = item.id

    # Messages

    def read(self, worker: int = -1, epoll: int = -1) -> Iterator[Pending | Object]:
        """New requests, and objects that the kernel closed. `worker` is of use for the other plane."""
        for _ in range(_BATCH):
            try:
                message = cachefiles.read_message(self.device)
            except ValueError as error:
                log.error("%s", error)
                continue
            if message is None:
                return
            if isinstance(message, cachefiles.Open):
                yield self._open(message)
            elif isinstance(message, cachefiles.Read):
                pending = self._read(message)
                if pending is not None:
                    yield pending
            else:
                item = self._close(message.object_id)
                if item is not None:
                    yield item

    def _open(self, message: cachefiles.Open) -> Pending:
        self.counters["opens"] += 1
        os.set_inheritable(message.fd, False)
        item = self._state.new_object(
            self.name,
            volume=message.volume.decode("latin-1"),
            cookie=message.cookie.decode("latin-1"),
            kernel_id=message.object_id,
        )
        self.writers[item.id] = message.fd
        self._by_kernel_id[message.object_id] = item.id
        return self._requests.add(item.id, 0, 0, message.msg_id, opening=True)

    def _read(self, message: cachefiles.Read) -> Pending | None:
        self.counters["reads"] += 1
        object_id = self._by_kernel_id.get(message.object_id)
        if object_id is None:
            log.error("cachefiles: READ of unknown object %d", message.object_id)
            return None
        return self._requests.add(object_id, message.offset, message.length, message.msg_id)

    def _close(self, kernel_id: int) -> Object | None:
        self.counters["closes"] += 1
        object_id = self._by_kernel_id.get(kernel_id)
        return self._forget(object_id) if object_id is not None else None

    # Answers

    def opened(self, pending: Pending, size: int) -> bool:
        """Answer an OPEN with a size in bytes, or -errno; whether the object is open now.

        Its descriptor is safe in the store before the kernel goes on, for the kernel drops an object without one.
        """
        item = self._state.objects[pending.object]
        if size >= 0 and not self._keep(item):
            size = -errno.EIO
        if size >= 0:
            item.size = size
            self._state.save()
        else:
            self.counters["refused"] += 1
        try:
            cachefiles.copen(self.device, pending.token, size)
        except OSError as error:
            self._failed("copen", pending, error)
            size = -errno.EINVAL
        if size < 0:
            self._forget(item.id)
            return False
        item.open = True
        self._state.save()
        return True

    def _keep(self, item: Object) -> bool:
        """Have an object's descriptor kept; a supervisor that is stopped does not take it, and the OPEN fails."""
        try:
            self._store.store(item.store_name, self.writers[item.id])
        except OSError as error:
            log.error("object %d is not kept: %s", item.id, error)
            return False
        return True

    def answer(self, pending: Pending, error: int) -> None:
        """End a READ. An error cannot be told: the kernel finds the hole, and the reader gets EIO."""
        if pending.opening:
            self.opened(pending, -(error or errno.EIO))
            return
        if error:
            self.counters["refused"] += 1
        try:
            cachefiles.read_complete(self.writers[pending.object], pending.token)
        except (OSError, KeyError) as failure:
            self._failed("READ_COMPLETE", pending, failure)

    def answer_by_presence(self, pending: Pending) -> None:
        """Without a worker: the kernel only asks for what is missing."""
        self.answer(pending, errno.EIO)

    def refuse_orphans(self) -> None:
        """In the place of a keeper that was killed: have the kernel ask again for what it had read."""
        self._requests.take_all()
        self._restore()

    def cull(self, directory: str, name: str) -> None:
        """EPERM for what is not below the cache: the kernel would bury any file of its file system."""
        place = self._place(directory, name)
        cachefiles.cull(self.device, place, name)

    def look(self, directory: str, name: str) -> int:
        """A descriptor of a cache file, for reading; EPERM for any other file. Its bytes are the image's."""
        return open_below(self.directory, str(self._place(directory, name) / name), os.O_RDONLY)

    def _place(self, directory: str, name: str) -> Path:
        parts = PurePath(directory).parts
        if PurePath(directory).is_absolute() or ".." in parts or PurePath(name).name != name or name == "..":
            raise OSError(errno.EPERM, "not in the cache", f"{directory}/{name}")
        return self.directory / directory

    def _failed(self, what: str, pending: Pending, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            self.counters["withdrawn"] += 1  # the reader was killed
        else:
            log.error("%s of object %d: %r", what, pending.object, error)

    def _forget(self, object_id: int) -> Object | None:
        item = self._state.objects.pop(object_id, None)
        if item is None:
            return None
        if self._by_kernel_id.get(item.kernel_id) == object_id:
            del self._by_kernel_id[item.kernel_id]
        os.close(self.writers.pop(object_id))
        self._requests.take_object(object_id)
        self._state.save()
        self._store.discard(item.store_name)
        return item
