"""Work in a child process: its result, what is done when there is none, and that no child stays."""

from __future__ import annotations

import os
import threading

import pytest

from loader.convert.beside import beside


def _children() -> str:
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read()


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@pytest.mark.usefixtures("two_processors")
def test_a_child_answers() -> None:
    here, before = os.getpid(), _children()
    with beside(lambda: b"%d " % os.getpid() + b"x" * 1_000_000) as result:
        number, _, rest = result().partition(b" ")
        assert int(number) != here
        assert rest == b"x" * 1_000_000
    assert _children() == before


@pytest.mark.usefixtures("two_processors")
def test_what_a_child_cannot_do_is_done_here() -> None:
    here = os.getpid()

    def work() -> bytes:
        if os.getpid() != here:
            os._exit(0)
        return b"here"

    with beside(work) as result:
        assert result() == b"here"


@pytest.mark.usefixtures("two_processors")
def test_an_error_is_raised_where_the_result_is_wanted() -> None:
    def work() -> bytes:
        raise ValueError("of the work")

    before = _children()
    with beside(work) as result, pytest.raises(ValueError, match="of the work"):
        result()
    with pytest.raises(KeyError), beside(work):
        raise KeyError
    assert _children() == before


@pytest.mark.parametrize(("processors", "threads"), [({0}, 1), ({0, 1}, 2)])
def test_without_a_child(monkeypatch: pytest.MonkeyPatch, processors: set[int], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    with beside(lambda: b"%d" % os.getpid()) as result:
        assert int(result()) == os.getpid()
