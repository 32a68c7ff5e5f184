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
from loader.keeper.requests import Present
from tests.support.cache_files import open_file, sample

BLOCKS = 100


def _pair(size: int = BLOCKS * BLOCK) -> tuple[Presence, Presence]:
    fd = presence.create(size)
    try:
        return Presence(fd), Presence(fd, writable=True)
    finally:
        os.close(fd)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)), max_size=12))
def test_it_is_a_set_of_blocks(changes: list[tuple[bool, int, int]]) -> None:
    reader, writer = _pair()
    expected: set[int] = set()
    for present, first, count in changes:
        blocks = range(first, min(first + count, BLOCKS))
        if present:
            writer.set(first * BLOCK, len(blocks) * BLOCK)
            expected |= set(blocks)
        else:
            writer.clear(first * BLOCK, len(blocks) * BLOCK)
            expected -= set(blocks)
    for block in range(BLOCKS):
        assert reader.has(block * BLOCK, BLOCK) == reader.has(block * BLOCK + 17, 1) == (block in expected)
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
