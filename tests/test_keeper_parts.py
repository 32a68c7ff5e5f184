"""The keeper's parts, without a kernel: packets, journal, descriptor store, state, table, reserved numbers."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachefiles
from loader.errors import BusyError, LoaderError
from loader.keeper import supervisor
from loader.keeper.calls import Calls
from loader.keeper.config import KeeperConfig
from loader.keeper.fdstore import FdStore, apply, listen_fds, parse_fields, receive_with_fds, to_environment
from loader.keeper.journal import CAPACITY, Entry, Journal
from loader.keeper.plane_cachefiles import CachefilesPlane
from loader.keeper.plane_fanotify import JOURNAL, FanotifyPlane, has_hole, reserve_journaled
from loader.keeper.protocol import (
    MAX_PACKET,
    Answer,
    Kind,
    Request,
    pack_answer,
    pack_json,
    pack_request,
    unpack,
)
from loader.keeper.requests import RequestTable
from loader.keeper.state import MountRecord, State

if TYPE_CHECKING:
    from loader.keeper.keeper import Keeper

# Packets


def test_a_thousand_mounts_with_long_paths_fit_into_packets() -> None:
    targets = [f"/{number}".ljust(4000, "x") for number in range(1000)]
    mounts = {target: MountRecord(target, "fanotify", target) for target in targets}
    keeper = SimpleNamespace(state=SimpleNamespace(mounts=mounts, fenced=[{"target": "/gone", "reason": "why"}]))
    packets = [unpack(pack_json(Kind.HELD, part)) for part in Calls(cast("Keeper", keeper)).held()]
    assert [mount["target"] for _, body in packets for mount in cast("dict[str, Any]", body)["mounts"]] == targets
    assert sum(len(cast("dict[str, Any]", body)["fenced"]) for _, body in packets) == 1


def test_packets() -> None:
    request, answer = Request(1 << 40, 7, 1 << 50, 4096), Answer(3, 5)
    assert unpack(pack_request(request)) == (Kind.REQUEST, request)
    assert unpack(pack_answer(answer)) == (Kind.ANSWER, answer)
    assert unpack(pack_json(Kind.CALL, {"token": 1, "call": "x"})) == (Kind.CALL, {"token": 1, "call": "x"})
    with pytest.raises(ValueError, match="RESULT packet of"):
        pack_json(Kind.RESULT, {"text": "x" * MAX_PACKET})


@pytest.mark.parametrize("packet", [b"", b"\x00", b"\x03", b"\x10short", b"\x12", b"\x12[]", b"\x12\xff", b"\x12{"])
def test_malformed_packets(packet: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(packet)


@given(st.binary(max_size=64))
def test_any_packet_is_read_or_refused(packet: bytes) -> None:
    try:
        unpack(packet)
    except ValueError:
        pass


# Journal


def test_journal_is_seen_by_a_successor() -> None:
    journal = Journal.create()
    entries = [Entry(9, 1, 4096, 8192), Entry(200, 2, 0, 1 << 40), Entry(CAPACITY - 1, 3, 0, 1)]
    for entry in entries:
        journal.add(entry)
    journal.add(Entry(10, 4, 0, 1))
    journal.clear(10)
    successor = Journal(os.dup(journal.fd))
    assert list(successor.entries()) == entries
    assert successor.high == CAPACITY
    successor.clear(9)
    assert [entry.fd for entry in journal.entries()] == [200, CAPACITY - 1]
    for fd in (-1, CAPACITY):
        with pytest.raises(ValueError, match="beyond the journal"):
            journal.add(Entry(fd, 1, 0, 1))
    for opened in (journal, successor):
        opened.close()
        os.close(opened.fd)


def test_journal_of_another_size(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file, pytest.raises(ValueError, match="journal of 0 bytes"):
        Journal(file.fileno())


def test_journaled_numbers_are_reserved() -> None:
    """In a process of its own: the numbers are taken, and a handed-down descriptor that has one is moved."""
    script = """
import os, sys
from loader.keeper.journal import Entry, Journal
from loader.keeper.plane_fanotify import JOURNAL, reserve_journaled
journal = Journal.create()
note = os.memfd_create("note")
os.write(note, b"kept")
free = os.dup(0)  # the number that the next descriptor gets
os.close(free)
numbers = {note, journal.fd, free, 40, 41}
for number in numbers:
    journal.add(Entry(number, 1, 0, 1))
fds = {JOURNAL: journal.fd, "note": note}
reserve_journaled(fds)
assert not set(fds.values()) & numbers, fds
assert os.pread(fds["note"], 9, 0) == b"kept"
assert {entry.fd for entry in Journal(fds[JOURNAL]).entries()} == numbers
null = os.stat("/dev/null").st_rdev
assert all(os.fstat(number).st_rdev == null for number in numbers)
assert os.dup(0) not in numbers
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("left", [("group",), ("journal",), ("group", "readers")])
def test_half_a_group_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]) -> None:
    """A keeper that died before it had stored all: the next one's are kept, and not dropped under the same names."""
    monkeypatch.setattr("fanotify.init", lambda: os.memfd_create("group"))
    kept = {name: os.memfd_create(f"old-{name}") for name in left}
    fds = {name: os.dup(fd) for name, fd in kept.items()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        store = FdStore(str(tmp_path / "notify"))
        plane = FanotifyPlane(store, State.load(tmp_path), RequestTable(), fds)
        for name in fds:  # as a keeper does
            store.remove(name)
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                data, received = receive_with_fds(server, 4096)
                apply(kept, parse_fields(data), received)
        store.close()
    own = plane.handed_down()
    assert fds == {} and kept.keys() == own.keys() == {"group", "journal", "readers"}
    assert all(os.path.sameopenfile(kept[name], own[name]) for name in own)
    for fd in [*kept.values(), *own.values()]:
        os.close(fd)


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FanotifyPlane:
    """One that the kernel knows nothing of, with a cache file of 4096 bytes."""
    monkeypatch.setattr("fanotify.init", lambda: os.memfd_create("group"))
    for name in ("mark_fd", "unmark_fd"):
        monkeypatch.setattr(f"fanotify.{name}", lambda group, fd: None)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(bytes(4096))
    return FanotifyPlane(FdStore(None), State.load(tmp_path), RequestTable(), {})


def open_descriptors() -> int:
    gc.collect()  # what tests before this one have left
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("size", [-1, 4097, 1 << 63, 1 << 80])
def test_a_size_that_no_file_has_is_refused(plane: FanotifyPlane, tmp_path: Path, size: int) -> None:
    """Recorded, it would end this keeper and each one after it."""
    before = open_descriptors()
    with pytest.raises(OSError, match="do not fit"):
        plane.create("one", str(tmp_path / "blobs/one"), "encoded", size)
    assert not plane.writers and open_descriptors() == before
    item = plane.create("one", str(tmp_path / "blobs/one"), "encoded", 4096)
    item.size = size  # as a keeper before this one may have recorded it
    if (lent := plane.lend(item.id)) is not None:
        os.close(lent)


def test_a_bitmap_that_cannot_be_mapped(plane: FanotifyPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = plane.create("one", str(tmp_path / "blobs/one"), "encoded", 4096)
    before = open_descriptors()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("loader.keeper.plane_fanotify.Presence", fail)
    assert plane.lend(item.id) is None
    assert open_descriptors() == before


def test_nothing_to_reserve() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    reserve_journaled({"group": 5})
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert JOURNAL == "journal"


# Descriptor store


def test_store_and_remove(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    fds: dict[str, int] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(address))
        store = FdStore(str(address))
        note = os.memfd_create("note")
        os.write(note, b"kept")
        for _ in range(2):  # the second replaces the first
            store.store("note", note)
            data, received = receive_with_fds(server, 4096)
            apply(fds, parse_fields(data), received)
        os.close(note)
        assert os.pread(fds["note"], 9, 0) == b"kept"
        assert not os.get_inheritable(fds["note"])
        store.notify("READY=1\nnonsense\nSTATUS=a=b")
        assert parse_fields(receive_with_fds(server, 4096)[0]) == {"READY": "1", "STATUS": "a=b"}
        store.remove("note")
        apply(fds, parse_fields(server.recv(4096)), [])
        assert fds == {}
        store.close()
    store.notify("READY=1")  # closed: no-op
    FdStore(None).store("note", -1)


def test_a_receiver_that_has_died(tmp_path: Path) -> None:
    """The kernel says so in one way once, and in another from then on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        mortal, other = FdStore(str(tmp_path / "notify"), mortal=True), FdStore(str(tmp_path / "notify"))
        late = FdStore(str(tmp_path / "notify"), mortal=True)
    mortal.beat()
    mortal.remove("name")
    other.beat()
    with pytest.raises(OSError):
        other.remove("name")
    assert late._socket is not None
    with pytest.raises(ConnectionRefusedError):
        late._socket.send(b"WATCHDOG=1")
    late.remove("name")
    other.close()


class FullStore(FdStore):
    """Of a supervisor that is stopped."""

    def __init__(self) -> None:
        super().__init__(None)
        self.full = False

    def send(self, text: str, fds: list[int] | None = None) -> None:
        if self.full:
            raise TimeoutError("timed out")


def test_an_object_goes_though_the_store_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a keeper that becomes the supervisor finds a descriptor of no object, and dies as the last that holds."""
    monkeypatch.setattr("fanotify.init", lambda: os.memfd_create("group"))
    for name in ("mark_fd", "unmark_fd"):
        monkeypatch.setattr(f"fanotify.{name}", lambda group, fd: None)
    (tmp_path / "blobs").mkdir()
    for name in ("one", "other"):
        (tmp_path / "blobs" / name).write_bytes(bytes(4096))
    store = FullStore()
    plane = FanotifyPlane(store, State.load(tmp_path), RequestTable(), {})
    item = plane.create("one", str(tmp_path / "blobs/one"), "decoded", 4096)
    store.full = True
    plane.release(item.id)
    with pytest.raises(TimeoutError):
        plane.create("other", str(tmp_path / "blobs/other"), "decoded", 4096)
    assert plane.writers == {} == plane._by_inode
    assert plane.handed_down().keys() == {"group", "journal", "readers"}
    plane.writers[7] = 7  # of no object, however that came about
    assert plane.handed_down().keys() == {"group", "journal", "readers"}


def test_a_cachefiles_object_and_a_store_that_takes_nothing(tmp_path: Path) -> None:
    device = os.open(tmp_path / "device", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    store, requests = FullStore(), RequestTable()
    config = KeeperConfig(root=tmp_path, plane="cachefiles")
    plane = CachefilesPlane(config, store, State.load(tmp_path), requests, {"device": device})
    kept, refused = (
        plane._open(cachefiles.Open(number, number, os.memfd_create("anonymous"), b"volume", b"cookie"))
        for number in (1, 2)
    )
    assert plane.opened(kept, 4096)
    store.full = True
    assert not plane.opened(refused, 4096)
    assert plane.handed_down().keys() == {"device", f"c{kept.object}"}
    assert plane._close(1) is not None
    assert plane.handed_down() == {"device": device} and not plane.writers
    assert (tmp_path / "device").read_bytes() == b"restorecopen 1,4096copen 2,-5"
    os.close(device)


def test_descriptors_without_a_name_are_closed() -> None:
    extra = os.memfd_create("extra")
    apply({}, {"FDSTORE": "1"}, [extra])
    with pytest.raises(OSError):
        os.fstat(extra)


def test_listen_fds() -> None:
    first, second = os.memfd_create("a"), os.memfd_create("b")
    environment = to_environment({"group": first, "f12": second}) | {"LISTEN_PID": "1"}
    assert environment["EROFS_LOADER_FDS"] == f"group:{first},f12:{second}"
    assert listen_fds(environment, os.getpid()) == {"group": first, "f12": second}
    assert environment == {}
    os.close(first)
    os.close(second)


@pytest.mark.parametrize("count", [2000, 2001, 65536])
def test_many_fds_fit_into_an_environment(count: int) -> None:
    script = f"""
import os
from loader.keeper.fdstore import listen_fds
os.set_inheritable = lambda fd, inheritable: None
found = listen_fds(os.environ, os.getpid())
assert found == {{f"f{{1000000 + number}}": number for number in range({count})}}, len(found)
assert not [name for name in os.environ if "FDS" in name]
"""
    environment = os.environ | to_environment({f"f{1000000 + number}": number for number in range(count)})
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent, env=environment)


def test_listen_fds_of_systemd() -> None:
    script = """
import os
from loader.keeper.fdstore import listen_fds
environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "group:journal", "LISTEN_PID": str(os.getpid())}
for number in (3, 4):
    os.dup2(0, number)
assert listen_fds(environment, os.getpid()) == {"group": 3, "journal": 4}
assert listen_fds({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "LISTEN_PID": "1"}, os.getpid()) == {}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


# State


def test_state_is_read_back(tmp_path: Path) -> None:
    state = State.load(tmp_path)
    item = state.new_object("fanotify", path="/x", form="decoded", size=5)
    state.mounts["/mnt"] = MountRecord("/mnt", "fanotify", "/meta", objects=[item.id])
    state.fenced.append({"target": "/old"})
    state.save()
    again = State.load(tmp_path)
    assert again == state
    assert again.objects[item.id].holes_read_as_zeros
    assert again.new_object("fanotify").id == item.id + 1
    again.drop_gone_mounts(set())
    assert again.mounts == {}


def _with_added(root: Path) -> State:
    """A state whose second object and second mount lie in lines behind the file."""
    state = State.load(root)
    state.new_object("fanotify", path="/first")
    state.mounts["/a"] = MountRecord("/a", "fanotify", "none", objects=[1])
    state.save()
    written = state.path.read_text()
    item = state.new_object("fanotify", path="/second")
    state.save_added([item])
    item.mounted = True
    state.mounts["/b"] = MountRecord("/b", "fanotify", "none", objects=[item.id])
    state.save_added([item], [state.mounts["/b"]])
    assert state.path.read_text() == written
    return state


def test_what_was_added_is_loaded(tmp_path: Path) -> None:
    state = _with_added(tmp_path)
    assert State.load(tmp_path) == state
    del state.mounts["/b"]
    state.save()
    assert State.load(tmp_path) == state


def test_a_torn_line_and_lines_of_another_file_say_nothing(tmp_path: Path) -> None:
    state = _with_added(tmp_path)
    added = tmp_path / "keeper.added"
    lines = added.read_text()
    added.write_text(lines + lines.splitlines()[1].replace("/b", "/c")[:-1])
    assert State.load(tmp_path) == state
    del state.mounts["/b"]
    state.save()
    added.write_text(lines)
    assert State.load(tmp_path) == state


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    _with_added(tmp_path)
    with (tmp_path / "keeper.added").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(LoaderError, match="damaged"):
        State.load(tmp_path)


def test_after_many_additions_the_file_is_replaced(tmp_path: Path) -> None:
    state = _with_added(tmp_path)
    before = state.path.read_text()
    largest = 0
    while state.path.read_text() == before:
        state.save_added([state.new_object("fanotify", path="/x" * 400)])
        largest = max(largest, *(path.stat().st_size for path in tmp_path.glob("keeper.added")), 0)
    assert 60_000 < largest <= 1 << 16
    assert not (tmp_path / "keeper.added").exists()
    assert State.load(tmp_path) == state


def test_an_addition_that_cannot_be_written_makes_the_next_one_a_whole_file(tmp_path: Path) -> None:
    state = _with_added(tmp_path)
    added = tmp_path / "keeper.added"
    added.unlink()
    added.mkdir()
    item = state.new_object("fanotify")
    with pytest.raises(IsADirectoryError):
        state.save_added([item])
    added.rmdir()
    state.save_added([item])
    assert State.load(tmp_path) == state


def test_state_of_another_boot_is_forgotten(tmp_path: Path) -> None:
    state = State.load(tmp_path)
    state.new_object("fanotify")
    state.boot_id = "another"
    state.save()
    assert State.load(tmp_path).objects == {}


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "{"])
def test_damaged_state_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "keeper.json").write_text(text)
    with pytest.raises(LoaderError, match="damaged"):
        State.load(tmp_path)


@pytest.mark.parametrize("left", ["", "\0" * 4096])
def test_what_a_power_cut_left_of_the_state_is_forgotten(tmp_path: Path, left: str) -> None:
    path = tmp_path / "keeper.json"
    path.write_text(left)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    os.utime(path, (booted - 5, booted - 5))
    assert State.load(tmp_path).mounts == {}
    os.utime(path, (booted + 5, booted + 5))
    with pytest.raises(LoaderError, match="damaged"):
        State.load(tmp_path)


def test_state_of_another_version_is_refused_but_not_after_a_reboot(tmp_path: Path) -> None:
    state = State.load(tmp_path)
    state.new_object("fanotify")
    state.save()
    path = tmp_path / "keeper.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(LoaderError, match="another version"):
        State.load(tmp_path)
    path.write_text(path.read_text().replace(state.boot_id, "another"))
    assert State.load(tmp_path).objects == {}


def test_state_that_cannot_be_written_stays_whole(tmp_path: Path) -> None:
    state = State.load(tmp_path)
    state.save()
    before = state.path.read_text()
    state.fenced.append({"not json": b"bytes"})
    with pytest.raises(TypeError):
        state.save()
    assert state.path.read_text() == before


def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    state = State.load(tmp_path)
    state.path = tmp_path / "away" / "keeper.json"
    state.save()
    assert state.unsaved
    with pytest.raises(OSError):
        state.save_now()
    state.path.parent.mkdir()
    state.save()
    assert json.loads(state.path.read_text())["version"] == 1
    assert State(state.path, state.boot_id) == state


def test_config_survives_json() -> None:
    config = KeeperConfig(
        root=Path("/r"), worker_env={"A": "b"}, cachefiles_dir=Path("/c"), cachefiles_limits={"brun": 9}
    )
    assert KeeperConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["root"] == "/r"
    for wrong in ({"plane": "nbd"}, {"on_stop": "explode"}):
        with pytest.raises(ValueError, match="expected one of|on_stop"):
            KeeperConfig(**wrong)  # type: ignore[arg-type]


# Requests


def test_table_gives_each_request_once() -> None:
    table = RequestTable()
    first, second = table.add(1, 0, 4096, 9), table.add(2, 0, 0, 10, opening=True)
    assert [pending.id for pending in table] == [first.id, second.id]
    assert table.take(first.id) is first
    assert table.take(first.id) is None
    assert table.take_object(1) == []
    assert second.describe()["what"] == "OPEN"
    assert table.take_overdue(60) == []
    second.since = time.monotonic() - 61
    assert table.take_overdue(60) == [second]
    assert len(table) == 0
    third = table.add(3, 0, 1, 1)
    assert third.id > second.id
    assert table.take_all() == [third]


def test_while_others_are_served_a_request_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for ever: the worker may hang at this one."""
    now = [1000.0]
    monkeypatch.setattr("loader.keeper.requests.time.monotonic", lambda: now[0])
    table = RequestTable()
    pending = table.add(1, 0, 4096, 9)
    pending.since = now[0]
    for _ in range(4):
        now[0] += 50
        assert table.take_overdue(60) == []
        table.served()
    now[0] += 41
    assert table.take_overdue(60) == [pending]
    other = table.add(1, 0, 4096, 9)
    other.since = now[0]
    table.served()
    now[0] += 61
    assert table.take_overdue(60) == [other]


def test_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 20)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x" * 8192, 65536)
    assert not has_hole(fd, 65536, 8192)
    assert not has_hole(fd, 65536 + 4096, 4096)
    assert has_hole(fd, 65536, 8193)
    assert has_hole(fd, 0, 4096)
    assert has_hole(fd, 1 << 20, 1)
    assert not has_hole(fd, 0, 0)
    os.close(fd)


# Supervisor


def test_one_daemon_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOCK_PATIENCE", 0.1)
    held = supervisor._lock(tmp_path)
    with pytest.raises(BusyError, match="another daemon"):
        supervisor.run(KeeperConfig(root=tmp_path, socket=tmp_path / "control.sock"))
    os.close(held)


def test_a_control_socket_that_answers_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(BusyError, match="answers there"):
            supervisor._listen(path)
    fd = supervisor._listen(path)  # what a killed daemon left
    assert path.stat().st_mode & 0o777 == 0o600
    os.close(fd)
