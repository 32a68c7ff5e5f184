from typing import Any

class _Lib:
    FAN_CLASS_PRE_CONTENT: int
    FAN_CLOEXEC: int
    FAN_NONBLOCK: int
    FAN_UNLIMITED_QUEUE: int
    FAN_UNLIMITED_MARKS: int
    FAN_REPORT_FD_ERROR: int
    FAN_REPORT_TID: int
    FAN_MARK_ADD: int
    FAN_MARK_REMOVE: int
    FAN_PRE_ACCESS: int
    FAN_Q_OVERFLOW: int
    FAN_ALLOW: int
    FAN_DENY: int
    FAN_ERRNO_SHIFT: int
    FAN_EVENT_INFO_TYPE_RANGE: int
    FANOTIFY_METADATA_VERSION: int

    def eod_fanotify_init(self, flags: int, event_flags: int) -> int: ...
    def eod_fanotify_mark(self, group: int, flags: int, mask: int, path: bytes) -> int: ...
    def eod_fanotify_mark_fd(self, group: int, flags: int, mask: int, fd: int) -> int: ...

lib: _Lib
ffi: Any
