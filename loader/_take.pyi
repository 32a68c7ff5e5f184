from typing import Any

class _Lib:
    EOD_ODD: int
    EOD_WHOLE: int
    EOD_RIGHT: int
    EOD_WRITTEN: int
    def eod_take(
        self,
        connection: int,
        buffer: Any,
        room: int,
        first: int,
        last: int,
        patience: int,
        digest: Any,
        file: int,
        place: int,
        out: Any,
    ) -> int: ...
    def eod_is_plain(self, head: Any, length: int, first: int, last: int) -> int: ...

lib: _Lib
ffi: Any
