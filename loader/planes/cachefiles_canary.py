"""The canary on the cachefiles plane: a cache of its own, mounted by fsid."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cachefiles
from loader.planes.canary import FSID, PATIENCE, CanaryFailed, CanaryImage, check_reads, step
from mounts import mount_erofs, umount2
from mounts.syscalls import MNT_DETACH

_IDLE = 0.01


def run(directory: Path, image: CanaryImage) -> None:
    """Mount and read the image with a cache in `directory`; CanaryFailed says what broke."""
    target, cache = directory / "mnt", directory / "cachefiles"
    target.mkdir()
    cache.mkdir()
    with contextlib.ExitStack() as cleanup:
        with step("device"):
            device = cachefiles.open_device()
        cleanup.callback(os.close, device)
        with step("bind"):
            cachefiles.bind(device, cache, "canary")
        filler = _Filler(device, {FSID.encode(): image.metadata, image.tag.encode(): image.data})
        cleanup.callback(filler.close)
        _mount(image, target, filler)
        cleanup.callback(umount2, target, MNT_DETACH)
        check_reads(image, target, filler.serve)


def _mount(image: CanaryImage, target: Path, filler: _Filler) -> None:
    """Mount in a thread: the kernel waits until its OPENs are answered."""
    failures: list[OSError] = []

    def body() -> None:
        try:
            mount_erofs("none", [], [f"fsid={FSID}", *image.options], target)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    until = time.monotonic() + PATIENCE
    while thread.is_alive():
        filler.serve(False)
        if time.monotonic() > until:
            raise CanaryFailed("mount", f"no end after {PATIENCE:.0f} s")
    if failures:
        raise CanaryFailed("mount", failures[0].strerror or str(failures[0]), failures[0])
    if not filler.opened:
        raise CanaryFailed("fsid", "the kernel mounted without opening an object", OSError(errno.EOPNOTSUPP, "fsid"))


class _Filler:
    """Answers the device's messages from bytes at hand."""

    def __init__(self, device: int, contents: dict[bytes, bytes]) -> None:
        self._device, self._contents = device, contents
        self._objects: dict[int, tuple[int, bytes]] = {}
        self._writer = cachefiles.AlignedWriter(256 * 1024)
        self.opened = 0

    def serve(self, refuse: bool) -> bool:
        """Answer what has been asked; whether any READ was among it."""
        reads = 0
        while (message := cachefiles.read_message(self._device)) is not None:
            if isinstance(message, cachefiles.Open):
                self._open(message)
            elif isinstance(message, cachefiles.Read):
                reads += 1
                self._read(message, refuse)
            else:
                fd, _ = self._objects.pop(message.object_id, (-1, b""))
                _close(fd)
        if not reads:
            time.sleep(_IDLE)
        return bool(reads)

    def _open(self, message: cachefiles.Open) -> None:
        os.set_inheritable(message.fd, False)
        content = self._contents.get(message.cookie)
        self.opened += 1
        self._objects[message.object_id] = (message.fd, content or b"")
        size = -errno.ENOENT if content is None else len(content)
        _withdrawn_is_fine(lambda: cachefiles.copen(self._device, message.msg_id, size))

    def _read(self, message: cachefiles.Read, refuse: bool) -> None:
        fd, content = self._objects[message.object_id]
        data = content[message.offset : message.offset + message.length]
        # Only the blob is refused: a mount without metadata would prove nothing.
        if not (refuse and content is self._contents.get(self._blob_cookie())):
            self._writer.write(fd, data, message.offset)
        _withdrawn_is_fine(lambda: cachefiles.read_complete(fd, message.msg_id))

    def _blob_cookie(self) -> bytes:
        return next(cookie for cookie in self._contents if cookie != FSID.encode())

    def close(self) -> None:
        for fd, _ in self._objects.values():
            _close(fd)
        self._writer.close()


def _withdrawn_is_fine(call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
