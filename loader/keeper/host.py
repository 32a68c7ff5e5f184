"""The machine's mounts, from a process that may live in a mount namespace of its own, as systemd's unit does.

What is mounted for the whole machine is mounted, found and unmounted in the machine's namespace. The unit's standard
input is a descriptor of it: our capabilities do not suffice to open /proc/1/ns/mnt. Only threads that do one such thing
enter it; all else, and above all the worker, stays in the unit's namespace.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from mounts import mountinfo
from mounts.namespace import enter_mount_namespace, is_mount_namespace

NAMESPACE = "mount-namespace"  # the descriptor's name where it is handed down
T = TypeVar("T")


class Host:
    """`namespace` is a descriptor of the machine's mount namespace; None: it is the process's own."""

    def __init__(self, namespace: int | None = None) -> None:
        self.namespace = namespace

    def enter(self) -> None:
        """For a thread that ends with what it does: see the machine's mounts."""
        if self.namespace is not None:
            enter_mount_namespace(self.namespace)

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, called where the machine's mounts are. OSError EAGAIN: there is no room
        for the thread that this takes."""
        if self.namespace is None:
            return function()
        results: list[T] = []
        failures: list[BaseException] = []

        def body() -> None:
            try:
                self.enter()
                results.append(function())
            except BaseException as error:
                failures.append(error)

        start_thread(body).join()
        if failures:
            raise failures[0]
        return results[0]

    def erofs_targets(self) -> set[str]:
        """Where the machine has an EROFS mounted."""
        return {mount.target for mount in self.call(lambda: mountinfo("erofs"))}

    def handed_down(self) -> dict[str, int]:
        """For another process of this daemon."""
        return {} if self.namespace is None else {NAMESPACE: self.namespace}


def start_thread(body: Callable[[], None]) -> threading.Thread:
    """A thread that has begun. OSError EAGAIN where there is no room for one more: Python says RuntimeError."""
    thread = threading.Thread(target=body, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    return thread


def find_host(fds: dict[str, int]) -> Host:
    """By the descriptor that was handed down (taken out of `fds`), or by standard input's."""
    if NAMESPACE in fds:
        return Host(fds.pop(NAMESPACE))
    return Host(os.dup(0)) if is_mount_namespace(0) else Host()
