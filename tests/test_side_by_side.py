"""Work of several layers at once: results in order, and an end for all once one has failed."""

from __future__ import annotations

import threading

import pytest

from loader.convert.progress import NoProgress, Task
from loader.convert.side_by_side import side_by_side


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_results_are_in_order(limit: int) -> None:
    assert side_by_side(lambda item, _: 2 * item, range(9), NoProgress(), limit) == list(range(0, 18, 2))


def test_two_are_at_work_at_once() -> None:
    both = threading.Barrier(2, timeout=30)
    assert len(side_by_side(lambda _item, _task: both.wait(), [1, 2], NoProgress(), 2)) == 2


def test_one_that_fails_ends_the_others() -> None:
    begun = threading.Event()

    def work(item: str, task: Task) -> None:
        if item == "bad":
            begun.wait(30)
            raise ValueError(item)
        begun.set()
        while True:
            task.advance(1)

    with pytest.raises(ValueError, match="bad"):
        side_by_side(work, ["endless", "bad", "never"], NoProgress(), 2)
