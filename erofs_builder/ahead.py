"""Read ahead: a stream's chunks are fetched, decompressed and hashed by one thread while another takes them in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

_DEPTH = 6  # chunks of 1 MiB


@contextmanager
def read_ahead(chunks: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """The same chunks, produced by a thread that is some of them ahead.

    What the source raises is raised where the chunk would have come. Leaving the context ends the
    thread, at the latest when the source returns from the read it is in.
    """
    ready: Queue[bytes | BaseException] = Queue(_DEPTH)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(chunks, ready, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield _consume(ready)
    finally:
        stop.set()
        while thread.is_alive():
            while not ready.empty():
                ready.get_nowait()
            thread.join(0.01)


def _produce(chunks: Iterator[bytes], ready: Queue[bytes | BaseException], stop: threading.Event) -> None:
    try:
        for chunk in chunks:
            if chunk:
                ready.put(chunk)
            if stop.is_set():
                return
    except BaseException as error:  # handed to the consumer, whatever it is
        ready.put(error)
    else:
        ready.put(b"")


def _consume(ready: Queue[bytes | BaseException]) -> Iterator[bytes]:
    while item := ready.get():
        if isinstance(item, BaseException):
            raise item
        yield item
