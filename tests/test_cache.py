"""The cache on disk: ready bitmaps over kills and reboots, cache files, records, eviction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from erofs_builder.digest import Digest
from erofs_builder.errors import FrameTableError
from erofs_builder.payload import Form
from loader.cache.files import load_table, prepare_blob, store_table
from loader.cache.layout import Layout, replace_file
from loader.cache.ready import ReadyMap
from loader.cache.state import ImageRecord, MountRecord, State
from loader.cache.usage import BlobUsage, choose_victims, evict, measure
from loader.cache.writer import BufferedWriter, DirectWriter
from tests.support.cache_files import open_file, sample, table_of

BOOT, NEXT_BOOT = bytes(16), b"\1" * 16
TABLE = b"t" * 32  # identity of a frame table


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_a_table_is_stored_while_its_directory_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, table = Layout(tmp_path), table_of(sample(3))
    layout.prepare()
    directory = layout.blob(table.blob_digest, Form.ENCODED)
    evictions = iter([directory.rmdir, directory.rmdir])
    rename = Path.rename

    def evict_before(path: Path, target: Path) -> Path:
        next(evictions, lambda: None)()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", evict_before)
    store_table(layout, Form.ENCODED, table)
    assert load_table(layout, Form.ENCODED, table.blob_digest).encode() == table.encode()
    assert not list(layout.tmp.iterdir())


def test_a_bit_survives_the_process_but_not_the_boot(tmp_path: Path, tmp: Path) -> None:
    first = ReadyMap(tmp_path / "b", 19, tmp, BOOT, table=TABLE)
    first.set(0)
    first.set(18)
    # No close, no sync: the process is gone.
    same_boot = ReadyMap(tmp_path / "b", 19, tmp, BOOT, table=TABLE)
    assert [frame for frame in range(19) if same_boot[frame]] == [0, 18]
    assert same_boot.count == 2
    assert ReadyMap(tmp_path / "b", 19, tmp, NEXT_BOOT, table=TABLE).count == 0


def test_what_was_synced_survives_the_boot(tmp_path: Path, tmp: Path) -> None:
    data = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    ready = ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE)
    ready.set(3)
    assert ready.dirty
    ready.checkpoint(data)
    assert not ready.dirty
    ready.set(4)
    after = ReadyMap(tmp_path / "b", 10, tmp, NEXT_BOOT, table=TABLE)
    assert [frame for frame in range(10) if after[frame]] == [3]
    os.close(data)


def test_a_successor_syncs_what_a_killed_process_had_written(tmp_path: Path, tmp: Path) -> None:
    ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE).set(3)
    successor = ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE)
    assert successor.dirty
    successor.checkpoint(None)
    assert not ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE).dirty
    assert ReadyMap(tmp_path / "b", 10, tmp, NEXT_BOOT, table=TABLE)[3]


def test_a_cleared_bit_stays_cleared_after_a_reboot(tmp_path: Path, tmp: Path) -> None:
    ready = ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE)
    for frame in range(10):
        ready.set(frame)
    assert ready.complete
    ready.checkpoint(None)
    ready.clear([2, 9])
    assert ready.count == 8
    for boot in (BOOT, NEXT_BOOT):
        again = ReadyMap(tmp_path / "b", 10, tmp, boot, table=TABLE)
        assert [frame for frame in range(10) if not again[frame]] == [2, 9]


@pytest.mark.parametrize("damage", [b"", b"x" * 34, b"EROFSRM\x01" + bytes(16) + b"\7\0\0\0" + bytes(4) + b"\xff\xff"])
def test_a_damaged_bitmap_counts_as_empty(tmp_path: Path, tmp: Path, damage: bytes) -> None:
    (tmp_path / "b").mkdir()
    for name in ("ready", "synced"):
        (tmp_path / "b" / name).write_bytes(damage)
    assert ReadyMap(tmp_path / "b", 12, tmp, BOOT, table=TABLE).count == 0


def test_a_bitmap_of_another_table_counts_as_empty(tmp_path: Path, tmp: Path) -> None:
    ReadyMap(tmp_path / "b", 9, tmp, BOOT, table=TABLE).set(1)
    assert ReadyMap(tmp_path / "b", 10, tmp, BOOT, table=TABLE).count == 0
    first = ReadyMap(tmp_path / "c", 9, tmp, BOOT, table=b"1" * 32)
    first.set(1)
    first.checkpoint(None)
    assert ReadyMap(tmp_path / "c", 9, tmp, BOOT, table=b"2" * 32).count == 0
    first.set(2)
    assert ReadyMap(tmp_path / "c", 9, tmp, NEXT_BOOT, table=b"2" * 32).count == 0


def test_replace_file_leaves_nothing_behind_when_it_fails(tmp_path: Path, tmp: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "target", b"x", tmp)
    assert list(tmp.iterdir()) == []


@pytest.mark.parametrize("form", list(Form))
def test_a_cache_file_holds_frames_in_their_places(tmp_path: Path, form: Form) -> None:
    blob = sample()
    whole = bytes(blob.decoded if form is Form.DECODED else blob.encoded)
    file = open_file(tmp_path, blob, form)
    assert file.size == len(whole)
    assert list(file.covering(0, len(whole) + 99)) == list(range(len(file.table)))
    for frame in file.table:
        offset, size = file.place(frame)
        assert not file.has(frame.number)
        file.write(frame, whole[offset : offset + size])
        assert file.has(frame.number)
    assert Layout(tmp_path).data(file.blob, form).read_bytes() == whole
    assert file.ready.complete
    with pytest.raises(ValueError):
        file.write(file.table[0], b"too short")
    file.detach()
    with pytest.raises(OSError):
        file.write(file.table[0], whole[: file.place(file.table[0])[1]])


def test_tables_are_kept_and_checked(tmp_path: Path) -> None:
    table = table_of(sample(3))
    layout = Layout(tmp_path)
    layout.prepare()
    with pytest.raises(FrameTableError, match="no frame table"):
        load_table(layout, Form.ENCODED, table.blob_digest)
    prepare_blob(layout, Form.ENCODED, table)
    assert load_table(layout, Form.ENCODED, table.blob_digest).encode() == table.encode()
    path = layout.blob(table.blob_digest, Form.ENCODED) / "table"
    path.write_bytes(table_of(sample(2)).encode())
    with pytest.raises(FrameTableError, match="table of"):
        load_table(layout, Form.ENCODED, table.blob_digest)
    path.write_bytes(table.encode()[:-1] + b"\0")
    with pytest.raises(FrameTableError):
        load_table(layout, Form.ENCODED, table.blob_digest)


@pytest.mark.parametrize("lost", ["gone", "emptied"])
def test_a_lost_data_file_takes_its_bits_with_it(tmp_path: Path, lost: str) -> None:
    """As the keeper leaves it, when it fenced what nobody had guarded."""
    layout = Layout(tmp_path)
    layout.prepare()
    table = table_of(sample(3))
    data = prepare_blob(layout, Form.DECODED, table)
    ready = ReadyMap(data.parent, len(table), layout.tmp, table=table.identity)
    ready.set(0)
    ready.checkpoint(None)
    ready.close()
    assert prepare_blob(layout, Form.DECODED, table) == data
    assert ReadyMap(data.parent, len(table), layout.tmp, table=table.identity).count == 1
    if lost == "gone":
        data.unlink()
    else:
        os.truncate(data, 0)
    prepare_blob(layout, Form.DECODED, table)
    assert ReadyMap(data.parent, len(table), layout.tmp, table=table.identity).count == 0


def test_direct_writes_are_aligned(tmp_path: Path) -> None:
    writer = DirectWriter(os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    data = os.urandom(3 << 20)
    writer.write(4096, data)
    assert (tmp_path / "f").read_bytes() == bytes(4096) + data
    for offset, length in ((1, 4096), (4096, 4095)):
        with pytest.raises(ValueError, match="unaligned"):
            writer.write(offset, bytes(length))
    writer.close()


def test_a_writer_closes_its_descriptor_once_nobody_writes(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    writer = BufferedWriter(fd)
    with writer.descriptor() as held:
        writer.close()
        writer.close()
        assert os.fstat(held).st_size == 0  # still open
        with pytest.raises(OSError), writer.descriptor():
            pass
    with pytest.raises(OSError):
        os.fstat(fd)


def _image(number: int, blobs: tuple[tuple[Digest, int], ...]) -> ImageRecord:
    digest = Digest.of(b"image %d" % number)
    return ImageRecord(digest, f"docker://h/r:{number}", f"docker://h/r@{digest}", 7, blobs)


def test_records_survive(tmp_path: Path) -> None:
    blob = Digest.of(b"blob")
    state = State(tmp_path / "state.db")
    state.add_image(_image(1, ((blob, 7),)), Form.ENCODED, Digest.of(b"payload"))
    state.add_image(_image(1, ((blob, 7),)), Form.DECODED, Digest.of(b"other"))
    state.add_mount(MountRecord("/mnt", _image(1, ()).digest, Form.ENCODED, "fanotify", None, 1.5, "boot"))
    state.close()
    state = State(tmp_path / "state.db")
    (image,) = state.images()
    assert (image.name, image.blobs, image.pinned) == ("docker://h/r:1", ((blob, 7),), False)
    assert state.find_name("docker://h/r:1") == state.find_id(image.digest.hex[:8]) == image.digest
    assert state.find_id("sha256:" + image.digest.hex) == image.digest
    assert state.find_id("zzzzzzzz") is state.find_id(image.digest.hex[:5]) is None
    assert state.payloads(image.digest) == {Form.ENCODED: Digest.of(b"payload"), Form.DECODED: Digest.of(b"other")}
    assert [mount.target for mount in state.mounts()] == ["/mnt"]
    assert state.mount_at("/mnt") == state.mounts()[0] and state.mount_at("/other") is None
    assert state.mounted_blobs() == {(blob, Form.ENCODED)}
    assert state.image(image.digest) == image and state.image(Digest.of(b"unknown")) is None
    state.remove_mount("/mnt")
    state.remove_image(image.digest)
    assert state.images() == []
    assert state.mounts() == []
    assert state.mounted_blobs() == set()
    assert state.referenced() == set()


def test_records_that_need_not_be_synced_are_so_with_the_next_that_must(tmp_path: Path) -> None:
    def synchronous() -> int:
        return int(state._db.execute("PRAGMA synchronous").fetchone()[0])

    state = State(tmp_path / "state.db")
    assert synchronous() == 2  # FULL
    state.add_image(_image(1, ()), Form.ENCODED, Digest.of(b""))
    assert synchronous() == 2
    nothing: Any = None
    with pytest.raises(AttributeError):
        state.add_image(_image(2, ((nothing, nothing),)), nothing, nothing)
    assert synchronous() == 2
    state.touch_image(_image(1, ()).digest)
    (image,) = state.images()
    assert image.used > image.added


def test_a_name_moves_to_the_newer_image(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    old, new = _image(1, ()), _image(2, ())
    state.add_image(old, Form.ENCODED, Digest.of(b""))
    moved = ImageRecord(new.digest, old.name, new.source, 1, ())
    state.add_image(moved, Form.ENCODED, Digest.of(b""))
    assert state.find_name(old.name) == new.digest
    assert len(state.images()) == 2


def _usage(name: str, allocated: int, used: float, *, referenced: bool = False, pinned: bool = False) -> BlobUsage:
    return BlobUsage(Digest.of(name.encode()), Form.ENCODED, allocated, used, referenced, pinned)


def test_victims_are_unreferenced_first_then_least_recently_used() -> None:
    old, new = _usage("old", 10, 1, referenced=True), _usage("new", 10, 9, referenced=True)
    orphan, kept = _usage("orphan", 10, 8), _usage("kept", 10, 0, referenced=True, pinned=True)
    usages = [kept, old, orphan, new]

    def free(usage: BlobUsage) -> bool:
        return False

    assert choose_victims(usages, free, needed=None, unreferenced_only=True) == [orphan]
    assert choose_victims(usages, free, needed=5, unreferenced_only=False) == [orphan]
    assert choose_victims(usages, free, needed=15, unreferenced_only=False) == [orphan, old]
    assert choose_victims(usages, free, needed=None, unreferenced_only=False) == [orphan, old, new]
    assert choose_victims(usages, lambda usage: usage is orphan, needed=1, unreferenced_only=False) == [old]


def test_an_evicted_blob_is_gone_and_counted(tmp_path: Path) -> None:
    blob = sample()
    file = open_file(tmp_path, blob, Form.ENCODED)
    layout, state = Layout(tmp_path), State(tmp_path / "state.db")
    for frame in file.table:
        file.write(frame, bytes(blob.encoded[frame.encoded_offset :][: frame.encoded_size]))
    state.touch_blobs([(file.blob, Form.ENCODED)])
    (usage,) = measure(layout, state)
    assert usage.allocated >= len(blob.encoded)
    assert not usage.referenced
    evict(layout, state, usage)
    assert measure(layout, state) == []
    assert state.last_used() == {}
    assert list(layout.tmp.iterdir()) == []
