"""The kernel interface of fanotify pre-content events: groups, marks, events, answers. No policy."""

from fanotify.group import DENY_ERRNOS, PRE_ACCESS, Q_OVERFLOW, answer, init, mark, mark_fd, read_events, unmark_fd
from fanotify.wire import Event, parse_events

__all__ = [
    "DENY_ERRNOS",
    "Event",
    "PRE_ACCESS",
    "Q_OVERFLOW",
    "answer",
    "init",
    "mark",
    "mark_fd",
    "parse_events",
    "read_events",
    "unmark_fd",
]
