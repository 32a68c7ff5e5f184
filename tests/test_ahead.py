"""Reading ahead: the same chunks, the same errors, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from erofs_builder.ahead import read_ahead


def chunks(count: int, error: Exception | None = None) -> Iterator[bytes]:
    for number in range(count):
        yield b"%d" % number
        yield b""
    if error:
        raise error


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_everything_comes_in_order(count: int) -> None:
    with read_ahead(chunks(count)) as ahead:
        assert list(ahead) == [b"%d" % number for number in range(count)]


def test_an_error_comes_after_what_preceded_it() -> None:
    seen = []
    with (
        pytest.raises(ConnectionResetError, match="gone"),
        read_ahead(chunks(20, ConnectionResetError("gone"))) as ahead,
    ):
        for chunk in ahead:
            seen.append(chunk)
    assert len(seen) == 20


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_the_thread(taken: int) -> None:
    before = threading.active_count()
    endless = iter(lambda: b"x" * 1000, None)
    with pytest.raises(KeyError), read_ahead(endless) as ahead:
        for _ in range(taken):
            next(ahead)
        raise KeyError
    assert threading.active_count() == before
