"""Frames in flight: one fetch for all who want a frame, priorities, retries, deadlines."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from erofs_builder.payload import Form
from loader.cache.claims import FLOWS, LEAST_AHEAD, FlightTable, Priority, Run, Waiter
from loader.cache.files import CacheFile
from tests.support.cache_files import open_file, sample

FAR = 1e9


class Outcome:
    """A waiter's end."""

    def __init__(self, deadline: float = FAR) -> None:
        self.errors: list[int] = []
        self.waiter = Waiter(self.errors.append, deadline)


@pytest.fixture
def file(tmp_path: Path) -> CacheFile:
    return open_file(tmp_path, sample(), Form.ENCODED)


@pytest.fixture
def table() -> FlightTable:
    return FlightTable(4, 2, (1 << 20, 1 << 20, 1 << 20))


def _take(table: FlightTable) -> Run:
    run = table.take()
    assert run is not None
    return run


def _numbers(run: Run) -> list[int]:
    return [flight.frame for flight in run.flights]


def _land(table: FlightTable, run: Run) -> None:
    for flight in run.flights:
        flight.file.ready.set(flight.frame)
        table.land(flight)
    table.finish(run)


def test_two_who_want_a_frame_share_its_flight(table: FlightTable, file: CacheFile) -> None:
    first, second = Outcome(), Outcome()
    assert table.want(file, [3, 4], Priority.DEMAND, first.waiter) == 2
    assert table.want(file, [4], Priority.DEMAND, second.waiter) == 1
    run = _take(table)
    assert _numbers(run) == [3, 4]
    late = Outcome()
    table.want(file, [3], Priority.DEMAND, late.waiter)
    _land(table, run)
    assert first.errors == second.errors == late.errors == [0]
    assert len(table) == 0
    table.stop()
    assert table.take() is None


def test_what_is_ready_is_answered_at_once(table: FlightTable, file: CacheFile) -> None:
    file.ready.set(1)
    outcome = Outcome()
    assert table.want(file, [1], Priority.DEMAND, outcome.waiter) == 0
    assert outcome.errors == [0]
    assert len(table) == 0


def test_demand_goes_first_and_promotes(table: FlightTable, file: CacheFile) -> None:
    table.want(file, [0, 1, 2, 8], Priority.BACKGROUND, Outcome().waiter)
    table.want(file, [5, 6], Priority.AHEAD)
    table.want(file, [1, 6], Priority.DEMAND, Outcome().waiter)
    assert [_numbers(_take(table)) for _ in range(2)] == [[1], [6]]
    assert _numbers(_take(table)) == [5]


def test_background_waits_until_no_reader_does(table: FlightTable, file: CacheFile) -> None:
    table.want(file, [9], Priority.BACKGROUND, Outcome().waiter)
    table.want(file, [1], Priority.DEMAND, Outcome().waiter)
    run = _take(table)
    taken: list[Run] = []
    thread = threading.Thread(target=lambda: taken.append(_take(table)))
    thread.start()
    time.sleep(0.05)
    assert taken == []
    _land(table, run)
    thread.join(10)
    assert _numbers(taken[0]) == [9]


def test_ahead_leaves_connections_to_demand(table: FlightTable, file: CacheFile) -> None:
    table.want(file, [0, 2, 4, 6], Priority.AHEAD)
    assert [_numbers(_take(table)) for _ in range(2)] == [[0], [2]]
    table.want(file, [8], Priority.DEMAND, Outcome().waiter)
    assert _numbers(_take(table)) == [8]


def test_a_range_has_a_limit(file: CacheFile) -> None:
    table = FlightTable(4, 2, (8192, 8192, 8192))
    table.want(file, range(5), Priority.DEMAND, Outcome().waiter)
    sizes = [sum(flight.encoded_size for flight in _take(table).flights) for _ in range(3)]
    assert all(size <= 8192 for size in sizes)


def test_a_retried_flight_keeps_its_waiters(table: FlightTable, file: CacheFile) -> None:
    outcome = Outcome()
    table.want(file, [2], Priority.DEMAND, outcome.waiter)
    run = _take(table)
    table.retry(run.flights, 0.05)
    table.finish(run)
    joined = Outcome()
    table.want(file, [2], Priority.DEMAND, joined.waiter)
    started = time.monotonic()
    again = _take(table)
    assert time.monotonic() - started > 0.02
    assert again.flights[0].attempts == 2
    _land(table, again)
    assert outcome.errors == joined.errors == [0]


def test_a_run_that_is_left_without_an_end_flies_again(table: FlightTable, file: CacheFile) -> None:
    outcome = Outcome()
    table.want(file, [2, 3], Priority.DEMAND, outcome.waiter)
    run = _take(table)
    table.land(run.flights[0])
    table.finish(run)
    assert _numbers(_take(table)) == [3]
    assert outcome.errors == []


def test_nobody_retries_what_was_only_fetched_ahead(table: FlightTable, file: CacheFile) -> None:
    table.want(file, [2], Priority.AHEAD)
    run = _take(table)
    table.retry(run.flights, 0.0)
    table.finish(run)
    assert len(table) == 0


def test_a_failure_is_told_once_and_releases_the_claim(table: FlightTable, file: CacheFile) -> None:
    outcome = Outcome()
    table.want(file, [2, 3], Priority.DEMAND, outcome.waiter)
    run = _take(table)
    table.fail(run.flights, errno.EIO)
    table.finish(run)
    assert outcome.errors == [errno.EIO]
    assert len(table) == 0
    again = Outcome()
    assert table.want(file, [2], Priority.DEMAND, again.waiter) == 1
    _land(table, _take(table))
    assert again.errors == [0]


def test_each_waiter_has_its_own_deadline(table: FlightTable, file: CacheFile) -> None:
    patient, hasty = Outcome(), Outcome(time.monotonic() - 1)
    table.want(file, [2], Priority.DEMAND, patient.waiter)
    table.want(file, [2], Priority.DEMAND, hasty.waiter)
    assert table.expire() == 1
    assert (patient.errors, hasty.errors) == ([], [errno.EIO])
    _land(table, _take(table))
    assert (patient.errors, hasty.errors) == ([0], [errno.EIO])


def test_who_waits_for_his_turn_outlives_his_deadline(
    table: FlightTable, file: CacheFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While frames land and none of his failed; with the first failure, or when nothing comes any more, he is late."""
    queued, failing, firm = Outcome(), Outcome(), Outcome(time.monotonic() - 1)
    for outcome in (queued, failing):
        outcome.waiter.deadline, outcome.waiter.firm = time.monotonic() - 1, False
    table.want(file, [1], Priority.DEMAND)
    _land(table, _take(table))
    table.want(file, [9], Priority.DEMAND, failing.waiter)
    run = _take(table)
    table.retry(run.flights, 60)
    table.finish(run)
    table.want(file, [3, 5], Priority.DEMAND, queued.waiter)
    table.want(file, [3], Priority.DEMAND, firm.waiter)
    assert table.expire() == 2
    assert (queued.errors, failing.errors, firm.errors) == ([], [errno.EIO], [errno.EIO])
    later = time.monotonic() + FLOWS
    monkeypatch.setattr("loader.cache.claims.time.monotonic", lambda: later)
    assert table.expire() == 1
    assert queued.errors == [errno.EIO]


def test_a_closed_file_fails_its_waiters(table: FlightTable, file: CacheFile) -> None:
    outcome = Outcome()
    table.want(file, [2], Priority.DEMAND, outcome.waiter)
    table.forget(file)
    assert outcome.errors == [errno.EIO]
    assert table.waiting() == []


def test_no_more_is_fetched_ahead_than_keeps_the_link_busy(tmp_path: Path) -> None:
    file = open_file(tmp_path, sample(200), Form.ENCODED)
    size = max(frame.encoded_size for frame in file.table)
    window = 0
    table = FlightTable(64, 64, (1, 1, 1), lambda: window)
    table.want(file, range(len(file.table)), Priority.AHEAD)
    flying, taken = 0, 0
    while flying <= LEAST_AHEAD and taken < 64 and taken < len(file.table):
        flying += sum(flight.encoded_size for flight in _take(table).flights)
        taken += 1
    assert LEAST_AHEAD < flying <= LEAST_AHEAD + size
    threading.Timer(0.05, table.want, (file, [len(file.table) - 1], Priority.DEMAND)).start()
    assert _take(table).priority is Priority.DEMAND  # none of those ahead came before it
    window = 1 << 30
    assert _take(table).priority is Priority.AHEAD


def test_the_next_range_ahead_is_asked_for_while_the_last_one_comes(tmp_path: Path) -> None:
    file = open_file(tmp_path, sample(200), Form.ENCODED)
    table = FlightTable(4, 4, (1 << 20, 1 << 20, 1 << 20), lambda: 0)
    table.want(file, range(len(file.table)), Priority.AHEAD)
    first = _take(table)
    assert sum(flight.encoded_size for flight in first.flights) > LEAST_AHEAD
    assert table.take_now() is None
    for flight in first.flights:
        table.arrives(flight)
    assert table.take_now() is not None


def test_what_was_given_back_belongs_to_the_run_that_took_it_next(table: FlightTable, file: CacheFile) -> None:
    """A source failed, another is asked at once, before the first fetch has come to its end."""
    outcome = Outcome()
    table.want(file, [3], Priority.BACKGROUND, outcome.waiter)
    first = _take(table)
    table.retry(first.flights, 0.0)
    second = _take(table)
    table.finish(first)
    assert second.flights == first.flights and second.flights[0].fetching
    assert table.take_now() is None
    _land(table, second)
    assert outcome.errors == [0] and len(table) == 0
    assert table._flying == [0, 0, 0] and table._fetching == [0, 0, 0]


def test_a_late_end_takes_nothing_from_a_new_flight(table: FlightTable, file: CacheFile) -> None:
    table.want(file, [3], Priority.DEMAND, Outcome().waiter)
    old = _take(table)
    table.fail(old.flights, errno.EIO)
    again = Outcome()
    table.want(file, [3], Priority.DEMAND, again.waiter)
    table.fail(old.flights, errno.EIO)
    table.finish(old)
    assert again.errors == []
    _land(table, _take(table))
    assert again.errors == [0]


def test_one_thread_is_called_at_a_time(table: FlightTable, file: CacheFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call costs the caller; and the first that comes calls the next."""
    calls: list[int] = []
    monkeypatch.setattr(table._condition, "notify", lambda: calls.append(1))
    table._idle = 3
    for frame in (0, 2, 4):
        table.want(file, [frame], Priority.DEMAND, Outcome().waiter)
    assert len(calls) == 1
    table._called = False  # it has come
    assert table.take_now() is not None
    assert len(calls) == 2
