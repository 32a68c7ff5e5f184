"""The bitmap by which a keeper knows what it may answer by itself."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofs_builder.payload import Form
from loader.keeper import presence
from loader.keeper.notes import MOST, Notes
from loader.keeper.presence import BLOCK, Presence
from loader.keeper.protocol import Kind, Request, unpack
from loader.keeper.requests import Present, Repeats
from tests.support.cache_files import open_file, sample

BLOCKS = 100


def _pair(size: int = BLOCKS * BLOCK) -> tuple[Presence, Presence]:
    fd = presence.create(size)
    try:
        return Presence(fd), Presence(fd, writable=True)
    finally:
        os.close(fd)


CHANGES = st.sampled_from(("set", "clear", "know", "forget"))


@given(st.lists(st.tuples(CHANGES, st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)), max_size=12))
def test_they_are_two_sets_of_blocks(changes: list[tuple[str, int, int]]) -> None:
    reader, writer = _pair()
    expected: set[int] = set()
    known: set[int] = set()
    for change, first, count in changes:
        blocks = range(first, min(first + count, BLOCKS))
        if change == "set":
            writer.set(first * BLOCK, len(blocks) * BLOCK)
            expected |= set(blocks)
        elif change == "know":
            writer.know(first * BLOCK, len(blocks) * BLOCK)
            known |= set(blocks)
        elif change == "forget":
            writer.forget_known()
            known = set()
        else:
            writer.clear(first * BLOCK, len(blocks) * BLOCK)
            expected -= set(blocks)
    for block in range(BLOCKS):
        assert reader.has(block * BLOCK, BLOCK) == reader.has(block * BLOCK + 17, 1) == (block in expected)
        assert reader.knows(block * BLOCK, BLOCK) == reader.knows(block * BLOCK + 17, 1) == (block in known)
    assert not reader.has(0, 9 * BLOCKS * BLOCK) and not reader.knows(0, 9 * BLOCKS * BLOCK)
    for start in range(0, BLOCKS, 7):
        end = min(start + 9, BLOCKS)
        assert reader.has(start * BLOCK + 1, (end - start) * BLOCK - 1) == (set(range(start, end)) <= expected)
    reader.close()
    writer.close()


def test_nobody_can_shrink_it_and_a_keeper_cannot_write_it() -> None:
    fd = presence.create(BLOCKS * BLOCK)
    reader = Presence(fd)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    with pytest.raises(TypeError):
        reader.set(0, BLOCK)


@pytest.mark.parametrize("size", [1, 2, 16, 17])
def test_a_keeper_of_before_gives_one_bitmap(size: int) -> None:
    """Who writes into the second half of that says that blocks are there which are not."""
    fd = os.memfd_create("old")
    os.ftruncate(fd, size)
    reader, writer = Presence(fd), Presence(fd, writable=True)
    os.close(fd)
    blocks = 8 * size
    writer.know(0, blocks * BLOCK)
    assert not any(reader.has(block * BLOCK, BLOCK) for block in range(blocks))
    writer.set((blocks - 1) * BLOCK, BLOCK)
    writer.forget_known()
    assert reader.has((blocks - 1) * BLOCK, BLOCK) and not reader.knows((blocks - 1) * BLOCK, BLOCK)
    with pytest.raises(IndexError):
        writer.set(blocks * BLOCK, BLOCK)


def test_one_bitmap_ends_where_the_other_begins() -> None:
    reader, writer = _pair(BLOCK)
    with pytest.raises(IndexError):
        writer.set(0, 9 * BLOCK)
    with pytest.raises(IndexError):
        writer.know(8 * BLOCK, BLOCK)
    assert not reader.has(0, BLOCK) and not reader.knows(0, BLOCK)


def test_a_reader_that_goes_on_makes_few_notes() -> None:
    notes, told = Notes(), []
    reads = [Present(1, start * BLOCK, BLOCK) for start in range(1000)]
    reads[500:500] = [Present(2, 0, BLOCK), Present(2, 7 * BLOCK, BLOCK)]
    for read in reads:
        told += notes.add(read)
    assert notes.held
    told += notes.take()
    assert not notes.held and not notes.take()
    kinds, bodies = zip(*map(unpack, told), strict=True)
    assert set(kinds) == {Kind.PRESENT}
    requests = [body for body in bodies if isinstance(body, Request)]
    assert sum(request.id for request in requests) == len(reads)
    assert [request.object for request in requests].count(2) == 2
    first = [request for request in requests if request.object == 1]
    assert len(first) <= 4 + 1000 * BLOCK // MOST
    assert all(one.offset + one.length == other.offset for one, other in pairwise(first))


def test_what_need_not_be_told_is_counted_once_and_in_nobodys_way() -> None:
    notes = Notes()
    notes.repeat(Repeats(3, 3 * BLOCK))
    assert notes.waits and not notes.held and notes.add(Present(1, 0, BLOCK)) and not notes.take()
    notes.repeat(Repeats(2, BLOCK))
    assert list(map(unpack, notes.take_all())) == [(Kind.REPEATS, Request(5, 0, 0, 4 * BLOCK))]
    assert not notes.waits and not notes.take_all()


def test_a_cache_file_is_heard_of_for_what_was_not_read_lately(tmp_path: Path) -> None:
    file = open_file(tmp_path, sample(40), Form.DECODED)
    reader, writer = _pair(file.size)
    file.touch(range(3))  # nobody to tell
    file.share(writer)
    file.touch(range(4, 7))
    file.touch(range(0))
    assert [n for n in range(40) if reader.knows(*file.place(file.table[n]))] == [4, 5, 6]
    file.listen()
    assert not any(reader.knows(*file.place(file.table[n])) for n in range(40))
    file.detach()
    file.touch(range(3))
    file.listen()
    reader.close()


@pytest.mark.parametrize("form", list(Form))
def test_a_cache_file_says_what_it_has(tmp_path: Path, form: Form) -> None:
    blob = sample(40)
    file = open_file(tmp_path, blob, form)
    whole = bytes(blob.decoded if form is Form.DECODED else blob.encoded)

    def write(number: int) -> None:
        offset, size = file.place(file.table[number])
        file.write(file.table[number], whole[offset : offset + size])

    ready = set(random.Random(1).sample(range(40), 20))
    for number in sorted(ready)[:10]:
        write(number)
    reader, writer = _pair(file.size)
    file.share(writer)
    for number in sorted(ready)[10:]:
        write(number)
    gone = sorted(ready)[5:12]
    file.forget(gone)
    assert {n for n in range(40) if reader.has(*file.place(file.table[n]))} == ready - set(gone)
    write(gone[0])
    assert reader.has(*file.place(file.table[gone[0]]))
    file.detach()
    reader.close()
