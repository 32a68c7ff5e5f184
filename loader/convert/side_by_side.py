"""Several pieces of work at once: what one cannot spread over all processors leaves them to another.

A layer is decompressed by one thread and walked by another, and its last frames are compressed when nothing more of it
is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from loader.convert.progress import Task

Item = TypeVar("Item")
Done = TypeVar("Done")


class Stopped(Exception):
    """Another piece of work has failed, and this one is not needed any more."""


class _Shared:
    """A task that several threads advance, until one of them has failed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.stop = threading.Event()

    def advance(self, count: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self._task.advance(count)


def side_by_side(work: Callable[[Item, Task], Done], items: Sequence[Item], task: Task, limit: int) -> list[Done]:
    """The results, in the items' order; at most `limit` at a time, begun in that order.

    `work` tells the task that it gets how far it is; that ends it when another one has failed. Of several errors the
    first item's is raised.
    """
    if limit < 2 or len(items) < 2:
        return [work(item, task) for item in items]
    shared = _Shared(task)
    with ThreadPoolExecutor(limit, thread_name_prefix="layer") as pool:
        futures = [pool.submit(work, item, shared) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            shared.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    return [future.result() for future in futures]
