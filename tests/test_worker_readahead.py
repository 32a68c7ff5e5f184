"""What is fetched ahead: guesses, and how they are judged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from erofs_builder.hints import Hints
from erofs_builder.hints_codec import encode_hints
from erofs_builder.payload import Form, Payload
from loader.cache.files import CacheFile
from loader.worker.housekeeping import Housekeeper
from loader.worker.link_estimate import LinkEstimate
from loader.worker.readahead import Judge, ReadAhead
from loader.worker.rest import Rest
from loader.worker.service import Service
from tests.support.cache_files import open_file, sample


@pytest.fixture
def file(tmp_path: Path) -> CacheFile:
    return open_file(tmp_path, sample(800), Form.ENCODED)


def _ahead(file: CacheFile, hints: Hints | None = None, *, rest: bool = False) -> ReadAhead:
    ahead = ReadAhead(LinkEstimate(), 2 << 20, rest)
    ahead.learn(file.blob.raw, len(file.table), hints or Hints())
    return ahead


def _one(frame: int) -> range:
    return range(frame, frame + 1)


def test_scattered_reads_fetch_nothing_ahead(file: CacheFile) -> None:
    ahead = _ahead(file)
    assert [ahead.after(file, _one(frame)) for frame in (7, 300, 12, 90, 13)] == [[]] * 5


def test_a_sequential_reader_gets_a_growing_window(file: CacheFile) -> None:
    ahead = _ahead(file)
    sizes = [len(ahead.after(file, _one(frame))) for frame in range(10, 20)]
    assert sizes[:4] == [0, 0, 0, 0]
    assert 0 < sizes[4] < sizes[7] <= sizes[8]


def test_the_same_frame_again_is_no_progress(file: CacheFile) -> None:
    ahead = _ahead(file)
    assert [ahead.after(file, _one(10)) for _ in range(9)] == [[]] * 9


def test_a_small_file_is_fetched_whole(file: CacheFile) -> None:
    ahead = _ahead(file, Hints({frame: range(20, 24) for frame in range(20, 24)}))
    assert ahead.after(file, _one(22)) == [23, 20, 21]


def test_a_large_file_is_fetched_where_it_is_read(file: CacheFile) -> None:
    group = range(390)
    ahead = _ahead(file, Hints(dict.fromkeys(group, group)))
    assert ahead.after(file, _one(100)) == []
    assert ahead.after(file, _one(102)) == []
    assert [ahead.after(file, _one(frame)) for frame in (104, 106)] == [[105], [107]]
    assert ahead.after(file, _one(98)) == [99, 97, 96]
    assert 390 not in ahead.after(file, range(388, 390))


def test_companions_are_followed_once_they_were_seen(file: CacheFile) -> None:
    ahead = _ahead(file, Hints({}, {frame: (frame + 100,) for frame in range(0, 100, 3)}))
    assert ahead.after(file, _one(0)) == []
    ahead.after(file, _one(100))
    assert ahead.after(file, _one(30)) == []
    ahead.after(file, _one(130))
    assert ahead.after(file, _one(60)) == [160]


def test_guesses_that_do_not_come_true_are_given_up_and_taken_up_again(file: CacheFile, tmp_path: Path) -> None:
    other = open_file(tmp_path / "other", sample(800), Form.ENCODED)
    elsewhere = iter(range(0, 800, 3))
    groups = {frame: range(frame - frame % 4, frame - frame % 4 + 4) for frame in range(800)}
    ahead = _ahead(file, Hints(groups))
    followed = 0
    for start in range(0, 140, 4):
        followed += bool(ahead.after(file, _one(start)))
        for _ in range(7):
            ahead.after(other, _one(next(elsewhere)))
    assert 0 < followed < 35
    assert not ahead.after(file, _one(140))
    for start in range(144, 780):
        ahead.after(file, _one(start))
    assert ahead.after(file, _one(785))


def test_a_complete_file_needs_no_guesses(file: CacheFile) -> None:
    for frame in range(800):
        file.ready.set(frame)
    ahead = _ahead(file)
    assert [ahead.after(file, _one(frame)) for frame in range(9)] == [[]] * 9


def test_a_judge_counts_each_guess_once(file: CacheFile) -> None:
    judge = Judge(0, 1)
    for now in range(3):
        judge.guess((file, 1), now)
    judge.read((file, 1))
    judge.read((file, 1))
    assert not judge.trusted
    judge.guess((file, 2), 3)
    judge.read((file, 2))
    assert judge.trusted
    judge.guess((file, 3), 4)
    judge.forget(4 + 300)
    assert not judge.trusted


def test_the_link_is_measured() -> None:
    link = LinkEstimate()
    for _ in range(50):
        link.note(30_000, 0.03, 0.02)
        link.note(30_000, 0.5, 0.4)  # while much else was on its way
    assert 0.02 * 1e6 <= link.in_flight < 0.1 * 4e6
    assert link.ahead >= 2 * link.in_flight


def test_a_package_is_fetched_once_two_of_its_frames_are_read(file: CacheFile) -> None:
    package = (10, 40, 41, 90)
    ahead = _ahead(file, Hints(packages=dict.fromkeys(package, (package,))))
    assert ahead.after(file, _one(40)) == []
    assert ahead.after(file, _one(90)) == [10, 41]


def test_what_was_told_of_a_blob_is_forgotten_once_it_stays_closed(file: CacheFile) -> None:
    """Or a worker's memory grows with each image that it has ever seen."""
    ahead = _ahead(file, Hints({frame: range(3) for frame in range(3)}))
    ahead.expect(b"listed", [1])
    open_blobs: set[bytes] = {file.blob.raw}
    service: Any = SimpleNamespace(
        files=lambda: [file] if open_blobs else [], release_unused=lambda: 0, may_complete=lambda: False
    )
    housekeeper = Housekeeper(service, service, service, ahead, service, service)
    for _ in range(2):
        housekeeper.look_after()
    assert not ahead._listed
    assert ahead.after(file, _one(1)) == [2, 0]
    open_blobs.clear()
    housekeeper.look_after()  # it may have been opened in this moment
    assert ahead._hints
    open_blobs.add(file.blob.raw)
    housekeeper.look_after()
    open_blobs.clear()
    housekeeper.look_after()
    assert ahead._hints
    housekeeper.look_after()
    assert not ahead._hints


def _read_all(ahead: ReadAhead, file: CacheFile, order: Iterable[int]) -> tuple[int, list[int]]:
    """Read frames one by one: how many had to be waited for, and those that were fetched ahead and never read."""
    fetched, read, waited = set[int](), set[int](), 0
    for frame in order:
        waited += frame not in fetched and frame not in read
        read.add(frame)
        fetched.update(ahead.after(file, _one(frame)))
        for there in fetched | {frame}:
            file.ready.set(there)
    return waited, sorted(fetched - read)


def _walk(count: int) -> list[int]:
    """A blob's frames as a walk through the tree meets them: onwards on the whole, but no two in their order."""
    return [frame + (1, -1)[frame % 2] for frame in range(count)]


def test_a_walk_through_all_of_a_tree_is_followed(file: CacheFile) -> None:
    waited, in_vain = _read_all(_ahead(file), file, _walk(800))
    assert waited < 120
    assert not in_vain


def test_a_walk_that_ends_early_costs_less_than_it_has_saved(file: CacheFile) -> None:
    _, in_vain = _read_all(_ahead(file), file, _walk(400))
    assert 0 < len(in_vain) <= 200


def test_reading_part_of_what_lies_together_is_no_walk(file: CacheFile) -> None:
    waited, in_vain = _read_all(_ahead(file), file, [frame for frame in _walk(800) if frame % 40 < 12])
    assert (waited, in_vain) == (240, [])


def _scattered(count: int) -> list[int]:
    """Frames of a blob of 800, no two near each other in time."""
    return [frame * 331 % 800 for frame in range(count)]


def test_the_rest_comes_once_a_third_of_a_blob_was_read(file: CacheFile) -> None:
    ahead, order = _ahead(file, rest=True), _scattered(800)
    assert _read_all(ahead, file, order[:264]) == (264, [])
    waited, in_vain = _read_all(ahead, file, order[264:])
    assert waited < 180
    assert not in_vain


@pytest.mark.parametrize("count", range(260, 800, 20))
def test_no_more_of_the_rest_comes_in_vain_than_was_read(file: CacheFile, count: int) -> None:
    _, in_vain = _read_all(_ahead(file, rest=True), file, _scattered(count))
    assert len(in_vain) <= count
    assert (len(in_vain) + count == 800) == (count >= 420)


@pytest.mark.parametrize("why", ["not wanted", "no room", "no mark", "nothing ahead"])
def test_the_rest_does_not_come_where_it_does_not_pay(file: CacheFile, why: str) -> None:
    ahead = ReadAhead(LinkEstimate(), 0 if why == "nothing ahead" else 2 << 20, why != "not wanted")
    ahead.rest_pays(why != "no room")
    file.trusted = why != "no mark"
    assert not {frame for read in _scattered(500) for frame in ahead.after(file, _one(read))} & set(range(100))


def test_no_more_of_the_rest_is_asked_for_than_the_link_carries(file: CacheFile) -> None:
    """Or whoever starts something else waits behind all of it."""
    rest = Rest(file.table)
    asked = [rest.after(4096, (), file.ready) for _ in range(800)]
    pieces = [piece for piece in asked if piece]
    assert pieces[0] + pieces[1] == list(range(len(pieces[0]) * 2))
    assert sum(map(bool, asked[:400])) == 2, "nothing has come yet"
    assert len(pieces) == 3, "and then one was taken for lost"
    for frame in pieces[0] + pieces[1] + pieces[2]:
        file.ready.set(frame)
    assert rest.after(4096, (), file.ready)


def test_what_was_asked_for_and_did_not_come_is_asked_for_again(file: CacheFile) -> None:
    rest, lost = Rest(file.table), 30
    for _ in range(100_000):
        for frame in rest.after(4096, (), file.ready):
            if frame != lost:
                file.ready.set(frame)
    assert file.ready.count == 799
    again = Rest(file.table)
    asked = [frame for _ in range(100_000) for frame in again.after(4096, (), file.ready)]
    assert asked == [lost] * 3


def test_what_is_there_already_is_no_part_of_the_rest(file: CacheFile) -> None:
    for frame in range(0, 800, 2):
        file.ready.set(frame)
    ahead = _ahead(file, rest=True)
    assert not any(frame % 2 == 0 for read in _scattered(800) for frame in ahead.after(file, _one(read)))


def test_a_start_by_a_list_does_not_bring_the_rest(file: CacheFile) -> None:
    """A rebuilt layout's own blob holds what a start reads, and behind it what nobody does."""
    ahead = _ahead(file, rest=True)
    ahead.expect(file.blob.raw, range(600))
    assert _read_all(ahead, file, range(600)) == (600, [])


def test_reading_a_frame_again_tells_nothing(file: CacheFile) -> None:
    ahead = _ahead(file, Hints({frame: range(20, 24) for frame in range(20, 24)}))
    assert ahead.after(file, _one(22))
    assert ahead.after(file, _one(22)) == []


def test_malformed_hints_are_none(file: CacheFile, caplog: pytest.LogCaptureFixture) -> None:
    ahead = _ahead(file)
    payload = Payload(Form.ENCODED, b"", 0, (file.table,), hints=b"\x01\x01\0\xff\x7f\0\0")
    with caplog.at_level("WARNING"):
        Service._learn(cast("Service", SimpleNamespace(readahead=ahead)), payload)
    assert "no hints" in caplog.text
    assert ahead.after(file, _one(22)) == []


def test_hints_of_a_payload_are_heeded(file: CacheFile) -> None:
    ahead = _ahead(file)
    hints = encode_hints([Hints({frame: range(20, 24) for frame in range(20, 24)})], [file.table])
    payload = Payload(Form.ENCODED, b"", 0, (file.table,), hints)
    Service._learn(cast("Service", SimpleNamespace(readahead=ahead)), payload)
    assert ahead.after(file, _one(22)) == [23, 20, 21]


def test_hints_about_another_frame_table_are_none(file: CacheFile) -> None:
    """Else a frame could be asked for that the file does not have."""
    ahead = _ahead(file)
    ahead.learn(file.blob.raw, len(file.table) + 8, Hints({frame: range(796, 808) for frame in range(796, 808)}))
    assert ahead.after(file, _one(798)) == []


def test_a_stream_passes_over_what_was_read_before(file: CacheFile) -> None:
    ahead = _ahead(file)
    ahead._judges["scan"] = Judge(0, 10_000)  # it would do as well
    known = range(30, 200, 4)
    fetched = {other for frame in reversed(known) for other in ahead.after(file, _one(frame))}
    waited = []
    for frame in range(10, 200):
        if frame not in fetched and frame not in known:
            waited.append(frame)
        fetched.update(ahead.after(file, _one(frame)))
    assert waited == [10, 11, 12, 13, 14]


def test_small_files_that_share_frames_do_not_age_guesses(file: CacheFile) -> None:
    ahead, fetched, waited = _ahead(file), set[int](), 0
    for frame in _walk(800):
        waited += frame not in fetched
        for _ in range(50):
            fetched.update(ahead.after(file, _one(frame)))
    assert waited < 120
