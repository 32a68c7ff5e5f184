"""Work on a second processor, past Python's lock: in a copy of this process, which answers with bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Work = Callable[[], bytes]


@contextmanager
def beside(work: Work) -> Iterator[Work]:
    """`work` in a child process while the context is open; the function given waits for its result.

    With one processor, with threads whose locks a copy would hold forever, and when the child fails, `work` is done
    here instead, when its result is asked for: so it must give the same then, and its errors are raised there.
    """
    child = _start(work)
    if child is None:
        yield work
        return
    process, reader = child
    try:
        with open(reader, "rb") as answer:
            yield lambda: _whole(answer.read()) or work()
    finally:
        os.kill(process, signal.SIGKILL)  # it has answered, or nobody asks any more
        os.waitpid(process, 0)


def _start(work: Work) -> tuple[int, int] | None:
    """The child's number and where it answers."""
    if len(os.sched_getaffinity(0)) < 2 or threading.active_count() > 1:
        return None
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no memory for a copy
        os.close(reader)
        os.close(writer)
        return None
    if not child:
        _answer(work, writer)
    os.close(writer)
    return child, reader


def _answer(work: Work, writer: int) -> None:
    """In the child: write, with a last byte to say that this is all, and be gone at once."""
    with suppress(BaseException):
        data = memoryview(work() + b"!")
        while data:
            data = data[os.write(writer, data) :]
    os._exit(0)


def _whole(data: bytes) -> bytes:
    """What a child wrote; nothing unless it came to its end."""
    return data[:-1] if data[-1:] == b"!" else b""
