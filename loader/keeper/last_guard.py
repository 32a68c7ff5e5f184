"""The end of a daemon for which no keeper can be started any more: what it guards is fenced while it still holds."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time

import fanotify
from loader.keeper import fence
from loader.keeper.host import Host, start_thread
from loader.keeper.journal import Journal
from loader.keeper.plane_fanotify import unanswered
from loader.keeper.readable import readable
from loader.keeper.state import State

log = logging.getLogger(__name__)
_POLL = 0.1  # seconds
_PAUSE = 1.0  # seconds before another try


def fence_held(group: int, journal: int, state: State, host: Host) -> None:
    """Refuse what was asked and what is asked, until everything is fenced: the group may be closed then.

    In a thread, because to truncate a file with a mark is a question of this very group, and waits for its answer.
    """
    log.error("no keeper can be started: what is mounted and incomplete is fenced")
    for number in unanswered(Journal(journal), len(state.objects)):
        with contextlib.suppress(OSError):
            fanotify.answer(group, number, errno.EIO)
    fenced = threading.Event()

    def body() -> None:
        try:
            fence.fence_unguarded(state, host)
            fenced.set()
        except OSError as error:  # no room for a thread; a disk that cannot be written
            log.error("fence: %s; trying again", error)
            time.sleep(_PAUSE)

    thread: threading.Thread | None = None
    while not fenced.is_set():
        if thread is None or not thread.is_alive():
            with contextlib.suppress(OSError):
                thread = start_thread(body)
        _refuse(group)


def _refuse(group: int) -> None:
    """Deny reads; let truncations through."""
    if not readable([group], _POLL):
        return
    try:
        events = fanotify.read_events(group)
    except OSError as error:  # the kernel could not hand the event over, and has denied it
        log.error("fanotify: read: %s", error)
        return
    for event in events:
        if event.fd >= 0:
            with contextlib.suppress(OSError):
                fanotify.answer(group, event.fd, 0 if event.length == 0 else errno.EIO)
            os.close(event.fd)
