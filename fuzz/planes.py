"""Targets for what the keeper and the worker do with the kernel's messages, and with the names that come in them."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from cachefiles import wire as cachefiles_wire
from erofs_builder.digest import Digest
from erofs_builder.errors import FormatError, IntegrityError
from erofs_builder.followers import decode_followers, encode_followers
from erofs_builder.frame_list import decode_frames, encode_frames
from erofs_builder.page_trace import decode_page_trace, encode_page_trace
from erofs_builder.payload import Form
from fanotify import Q_OVERFLOW
from fanotify import wire as fanotify_wire
from loader.cache.layout import Layout
from loader.errors import LoaderError, RegistryError
from loader.keeper import plane_cachefiles, plane_fanotify
from loader.keeper.journal import Journal
from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.keeper.plane_fanotify import FanotifyPlane
from loader.keeper.readers import Readers
from loader.keeper.requests import Pending, Repeats, RequestTable
from loader.keeper.state import Object, State
from loader.registry import ranges
from loader.registry.base import Descriptor
from loader.registry.ranges import Origin, RangePool
from loader.trace import find_pages, find_trace
from loader.worker.images import Images
from loader.worker.objects import tags
from loader.worker.payloads import Payloads

ALLOWED = (FormatError, IntegrityError, LoaderError)
_BLOB = Digest.of(b"content")
_SIZE = 1 << 20


class _System:
    """The system calls of a plane: descriptor n is of file n % 4, of which three are objects; odd blocks are holes."""

    SEEK_HOLE = os.SEEK_HOLE
    O_RDWR, O_CLOEXEC, O_NOFOLLOW = os.O_RDWR, os.O_CLOEXEC, os.O_NOFOLLOW

    def __init__(self) -> None:
        self.closed: list[int] = []

    def close(self, fd: int) -> None:
        self.closed.append(fd)

    def fstat(self, fd: int) -> SimpleNamespace:
        if fd % 7 == 6:
            raise OSError(errno.EBADF, "bad descriptor")
        return SimpleNamespace(st_dev=0, st_ino=fd % 4)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        if offset >= _SIZE:
            raise OSError(errno.ENXIO, "beyond the end")
        return offset if offset >> 12 & 1 else _SIZE

    def set_inheritable(self, fd: int, inheritable: bool) -> None:
        if not 0 <= fd < 1 << 31:
            raise OverflowError("not a descriptor")

    strerror = staticmethod(os.strerror)


class _Store:
    def store(self, name: str, fd: int) -> None: ...

    def remove(self, name: str) -> None: ...


class _Saved(State):
    def save(self) -> None: ...

    save_now = save


_journal, _readers = Journal.create(), Readers.create()


def plane(data: bytes) -> None:
    """Events of a fanotify group, up to their answers: each gets one, whatever it asks for."""
    try:
        events = list(fanotify_wire.parse_events(data))
    except ValueError:
        return
    numbers = Counter(event.fd for event in events)
    events = [event for event in events if event.fd < 0 or numbers[event.fd] == 1]  # the kernel gives each its own
    system, answers = _System(), Counter[int]()
    subject = FanotifyPlane.__new__(FanotifyPlane)
    state = _Saved(Path("/nonexistent"), "")
    for number in range(3):
        made = Object(number, "fanotify", size=_SIZE, released=number == 2)
        state.objects[number] = made
    subject.__dict__.update(
        _store=_Store(), _state=state, _requests=RequestTable(), counters=Counter(), fencing=False, group=3,
        writers={number: number for number in range(3)}, _by_inode={(0, number): number for number in range(3)},
        _presence={}, _journal=_journal, _readers=_readers,
        # As if none of them were plain. tests/test_keeper_events.py holds the C that sees to those against this.
        _events=SimpleNamespace(
            take=lambda *_: events, allow=lambda *_: None, know=lambda *_: None, left_out=lambda: (0, Repeats(0, 0))
        ),
    )  # fmt: skip
    api = SimpleNamespace(
        Q_OVERFLOW=Q_OVERFLOW,
        answer=lambda group, fd, error: answers.update((fd,)), Event=fanotify_wire.Event,
    )  # fmt: skip
    with mock.patch.object(plane_fanotify, "os", system), mock.patch.object(plane_fanotify, "fanotify", api):
        found = [pending for pending in subject.read() if isinstance(pending, Pending)]
        for pending in found:
            assert 0 <= pending.offset < _SIZE and 0 < pending.length <= _SIZE - pending.offset
        for pending in subject._requests.take_all():
            subject.answer(pending, 0)
    asked = {event.fd for event in events if event.fd >= 0 and not event.mask & api.Q_OVERFLOW}
    assert answers == Counter(asked) and sorted(system.closed) == sorted(asked)


def plane_of_cachefiles(data: bytes) -> None:
    """Messages of /dev/cachefiles one after the other (each as long as it says): an OPEN is never lost."""
    messages, at = list[bytes](), 0
    while at + 16 <= len(data):
        length = max(16, int.from_bytes(data[at + 8 : at + 12], "little"))
        messages.append(data[at : at + length])
        at += length
    opened, ended = Counter[int](), Counter[int]()
    subject = CachefilesPlane.__new__(CachefilesPlane)
    subject.__dict__.update(
        _store=_Store(), _state=_Saved(Path("/nonexistent"), ""), _requests=RequestTable(), counters=Counter(),
        writers={}, _by_kernel_id={}, device=3, directory=Path("/nonexistent"),
    )  # fmt: skip
    waiting = iter(messages)
    api = SimpleNamespace(
        read_message=lambda device: cachefiles_wire.parse_message(message) if (message := next(waiting, b"")) else None,
        Open=cachefiles_wire.Open, Read=cachefiles_wire.Read,
        copen=lambda device, number, size: opened.update((number,)),
        read_complete=lambda fd, number: ended.update((number,)),
    )  # fmt: skip
    with mock.patch.object(plane_cachefiles, "os", _System()), mock.patch.object(plane_cachefiles, "cachefiles", api):
        taken = []
        for _ in range(1 + len(messages) // 64):
            taken += [found for found in subject.read() if isinstance(found, Pending)]
        for pending in subject._requests.take_all():
            if pending.opening:
                subject.opened(pending, 4096)
            else:
                subject.answer(pending, 0)
    assert opened.total() + ended.total() <= len(taken) <= len(messages)


def cookie(data: bytes) -> None:
    """An object's name that the kernel got from a mount: it leads to an image of ours or nowhere."""
    text = data.decode("latin-1")
    subject = Images.__new__(Images)
    layout = Layout(Path("/"))
    subject.__dict__.update(_layout=layout, _tags=tags({_BLOB}), payloads=Payloads.__new__(Payloads))
    with mock.patch.object(Path, "exists", lambda path: True):
        found = subject.find_metadata(text)
    path = found.path if found else None
    assert path is None or (path.parts[:2] == ("/", "images") and ".." not in path.parts and len(path.parts) == 4)
    tagged = subject.find_tag(text)
    assert tagged is None or (tagged[0] in Form and tagged[1] == _BLOB)


class _Source:
    """Has one referrer, whose manifest and pages are the input."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._described = Descriptor("m", Digest.of(data), len(data))

    def __str__(self) -> str:
        return "fuzz"

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        return [self._described]

    def manifest(self, descriptor: Descriptor) -> bytes:
        return self._data

    def blob(self, descriptor: Descriptor) -> bytes:
        return self._data


def trace(data: bytes) -> None:
    """What a start reads: frames (f), what follows some (w), a document of pages (p), or a referrer with either (r)."""
    kind, body = data[:1], data[1:]
    if kind == b"f":
        frames = decode_frames(body.decode("latin-1"))
        assert decode_frames(encode_frames(frames)) == frames or len(encode_frames(frames)) > 60000
    elif kind == b"w":
        followers = decode_followers(body.decode("latin-1"))
        again = decode_followers(encode_followers(followers))
        assert again == followers[: len(again)]
    elif kind == b"p":
        runs = decode_page_trace(body)
        assert decode_page_trace(encode_page_trace(runs)) == runs
    else:
        source: Any = _Source(body)
        assert isinstance(find_trace(source, _BLOB), str)
        find_pages(source, _BLOB)


class _Socket:
    """Sends the input in pieces of a size, then has closed the connection."""

    def __init__(self, data: bytes, piece: int) -> None:
        self._data, self._piece = data, piece
        self.closed = False

    def sendall(self, data: bytes) -> None: ...

    def recv(self, size: int, flags: int = 0) -> bytes:
        assert not self.closed
        part, self._data = self._data[: min(size, self._piece)], self._data[min(size, self._piece) :]
        return part

    def recv_into(self, view: memoryview, size: int = 0, flags: int = 0) -> int:
        part = self.recv(len(view))
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.closed = True


def range_answer(data: bytes) -> None:
    """An answer to a range request: size of the pieces in which it comes (1 byte), then the answer."""
    sock: Any = _Socket(data[1:], data[0] + 1 if data else 1)
    pool = RangePool(Origin("a.example", 80, None, 1.0, 1.0))
    with mock.patch.object(RangePool, "_connect", lambda self, shown: sock):
        response = pool.send("/v2/a/blobs/b", {"Range": "bytes=0-9"}, "shown")
    if response is None:
        assert sock.closed
        return
    assert 200 <= response.status < 1000 and all("\n" not in value for value in response.headers.values())
    try:
        parts = list(itertools.takewhile(len, (response.read(1000) for _ in range(1 << 12))))
        assert sum(map(len, parts)) <= len(data)
    except RegistryError:
        assert sock.closed
    with mock.patch.object(ranges, "_is_silent", lambda sock: True):
        response.close()
        pool.close()
    assert sock.closed
