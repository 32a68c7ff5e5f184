"""cffi build of the cachefiles ioctl (cachefiles/csrc/kabi.c). API mode: the compiler supplies every constant."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    #define CACHEFILES_MSG_MAX_SIZE ...
    #define CACHEFILES_IOC_READ_COMPLETE ...
    static const int CACHEFILES_OP_OPEN;
    static const int CACHEFILES_OP_CLOSE;
    static const int CACHEFILES_OP_READ;

    struct cachefiles_msg { uint32_t msg_id; uint32_t opcode; uint32_t len; uint32_t object_id; ...; };
    struct cachefiles_open { uint32_t volume_key_size; uint32_t cookie_key_size; uint32_t fd; uint32_t flags; ...; };
    struct cachefiles_read { uint64_t off; uint64_t len; ...; };

    int eod_read_complete(int fd, uint32_t msg_id);
    """
)
ffibuilder.set_source(
    "cachefiles._kabi",
    '#include "kabi.h"',
    sources=["cachefiles/csrc/kabi.c"],
    include_dirs=["cachefiles/csrc"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
