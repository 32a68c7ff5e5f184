from typing import Any

class _Lib:
    CACHEFILES_MSG_MAX_SIZE: int
    CACHEFILES_IOC_READ_COMPLETE: int
    CACHEFILES_OP_OPEN: int
    CACHEFILES_OP_CLOSE: int
    CACHEFILES_OP_READ: int

    def eod_read_complete(self, fd: int, msg_id: int) -> int: ...

lib: _Lib
ffi: Any
