from typing import Any

class _Lib:
    def eod_crc32c(self, state: int, data: Any, length: int) -> int: ...
    def eod_tar_header(self, block: Any, out: Any) -> int: ...

lib: _Lib
ffi: Any
