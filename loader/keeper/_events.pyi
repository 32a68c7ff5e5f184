from typing import Any

class _Lib:
    EOD_BLOCK: int
    EOD_JOURNAL_CAPACITY: int
    EOD_JOURNAL_START: int
    EOD_READERS_CAPACITY: int
    EOD_REQUEST: int
    EOD_TELL: int
    EOD_OTHER: int
    EOD_PRESENT: int
    EOD_PENDING: int
    EOD_SENT: int
    EOD_TOLD: int
    EOD_REPEAT: int
    def eod_plane_new(self, group: int, journal: Any, readers: Any) -> Any: ...
    def eod_plane_free(self, plane: Any) -> None: ...
    def eod_plane_put(
        self, plane: Any, device: int, inode: int, object: int, size: int, writer: int, bitmaps: Any, bytes: int
    ) -> int: ...
    def eod_plane_drop(self, plane: Any, device: int, inode: int) -> None: ...
    def eod_plane_reader(self, plane: Any, thread: int, slot: int) -> None: ...
    def eod_plane_take(
        self,
        plane: Any,
        worker: int,
        epoll: int,
        longest: int,
        first: int,
        buffer: Any,
        room: int,
        events: Any,
        rest: Any,
    ) -> int: ...
    def eod_plane_allow(
        self, plane: Any, fd: int, writer: int, thread: int, object: int, offset: int, length: int
    ) -> int: ...

lib: _Lib
ffi: Any
