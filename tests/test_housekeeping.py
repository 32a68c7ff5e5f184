"""What a worker does for its open files by the clock, and what does not wait for it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.payload import Form
from loader.cache.files import CacheFile
from loader.worker import housekeeping
from loader.worker.housekeeping import Housekeeper
from tests.support.cache_files import open_file, sample
from tests.support.sample_blobs import SampleBlob


class Around:
    """All that a housekeeper has to do with, of one file; `called` are the keeper's calls."""

    def __init__(self, file: CacheFile, blob: SampleBlob) -> None:
        self.file, self._blob, self.room = file, blob, True
        self.fill()
        self.called: list[tuple[str, int]] = []
        self.told = threading.Event()

    def fill(self) -> None:
        """Have all frames."""
        for frame in self.file.table:
            offset, size = self.file.place(frame)
            self.file.write(
                frame, bytes(self._blob.decoded if self.file.decoded else self._blob.encoded)[offset:][:size]
            )

    def files(self) -> list[CacheFile]:
        return [self.file]

    def may_complete(self) -> bool:
        return self.room

    @contextmanager
    def completing(self, file: CacheFile) -> Iterator[bool]:
        yield file.ready.complete

    def call(self, name: str, **arguments: int) -> None:
        self.called.append((name, arguments["object"]))
        self.told.set()

    def release_unused(self) -> int:
        return 0

    def rest_pays(self, pays: bool) -> None:
        pass

    def keep(self, blobs: set[bytes]) -> None:
        pass

    def touch_blobs(self, blobs: object) -> None:
        pass


@pytest.fixture(params=list(Form))
def around(request: pytest.FixtureRequest, tmp_path: Path) -> Around:
    blob = sample(12)
    return Around(open_file(tmp_path, blob, request.param), blob)


def _keeper_of_house(around: Around) -> Housekeeper:
    anything: Any = around
    return Housekeeper(anything, anything, anything, anything, anything, anything)


def test_a_whole_file_does_not_wait_for_the_clock(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "CHECKPOINT_INTERVAL", 3600.0)
    housekeeper, stopped = _keeper_of_house(around), threading.Event()
    thread = threading.Thread(target=housekeeper.run, args=(stopped,))
    thread.start()
    try:
        assert not around.told.wait(0.3)  # nobody has said so
        housekeeper.hurry()
        assert around.told.wait(20)
    finally:
        stopped.set()
        housekeeper.hurry()
        thread.join()
    assert around.called == [("complete", 1)]
    assert around.file.completed
    assert not around.file.ready.dirty


def test_what_is_whole_does_not_keep_the_clock_waiting(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "CHECKPOINT_INTERVAL", 0.3)
    monkeypatch.setattr(housekeeping, "LEAST_INTERVAL", 0.01)
    housekeeper, stopped, looked = _keeper_of_house(around), threading.Event(), threading.Event()
    monkeypatch.setattr(around, "release_unused", looked.set)
    thread = threading.Thread(target=housekeeper.run, args=(stopped,))
    thread.start()
    try:
        until = time.monotonic() + 20
        while not looked.is_set() and time.monotonic() < until:
            housekeeper.hurry()
            time.sleep(0.005)
        assert looked.is_set()
    finally:
        stopped.set()
        housekeeper.hurry()
        thread.join()


def test_a_file_that_lacks_a_frame_keeps_its_mark(around: Around) -> None:
    around.file.forget([3])
    _keeper_of_house(around).complete()
    assert not around.called


def test_over_the_quota_a_whole_file_keeps_its_mark(around: Around) -> None:
    around.room = False
    _keeper_of_house(around).complete()
    assert not around.called


def _fails(*arguments: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_the_disk_did_not_take_keeps_its_mark(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    housekeeper = _keeper_of_house(around)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _fails)
        housekeeper.look_after()
    assert not around.called
    housekeeper.look_after()
    assert not around.called
    around.fill()
    housekeeper.look_after()
    assert around.called == [("complete", 1)]


def test_what_the_disk_did_not_take_is_gone_though_its_bits_stand(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that went read-only: not even a bit can be cleared."""
    housekeeper = _keeper_of_house(around)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _fails)
        patch.setattr(os, "pwrite", _fails)
        housekeeper.look_after()
        housekeeper.look_after()
    for _ in range(3):
        housekeeper.look_after()
    assert not around.called
    assert around.file.ready.count == 0
    assert not any(around.file.ready[frame] for frame in range(len(around.file.table)))
    around.fill()
    housekeeper.look_after()
    assert around.called == [("complete", 1)]
    assert not around.file.ready.unsynced()


def test_who_comes_second_does_not_sync_what_the_first_has_lost(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fails_slowly(fd: int) -> None:
        monkeypatch.undo()
        begun.set()
        assert go_on.wait(20)
        _fails()

    monkeypatch.setattr(os, "fdatasync", fails_slowly)
    first = threading.Thread(target=housekeeping.checkpoint, args=(around.file,))
    second = threading.Thread(target=_keeper_of_house(around).complete)
    first.start()
    assert begun.wait(20)
    second.start()
    second.join(0.3)
    go_on.set()
    first.join()
    second.join()
    assert not around.called
    assert around.file.ready.count == 0
