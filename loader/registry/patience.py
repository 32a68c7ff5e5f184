"""Ask again what a registry could not answer just now: for documents and uploads, where somebody waits anyway.

`read_range` is not asked again here: its caller knows the deadline and other sources.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from loader.errors import TransientRegistryError, UnreachableError

T = TypeVar("T")
ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds; doubles
_LONGEST_PAUSE = 60.0


def pause(attempt: int, error: TransientRegistryError) -> None:
    """Wait as long as the registry asks, and longer each time."""
    time.sleep(min(max(FIRST_PAUSE * 2**attempt, error.retry_after or 0.0), _LONGEST_PAUSE))


def patiently(call: Callable[[], T]) -> T:
    """The call's result, after some attempts if need be. A registry that is not there at all is not waited for."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except UnreachableError:
            raise
        except TransientRegistryError as error:
            pause(attempt, error)
    return call()
