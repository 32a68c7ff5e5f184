"""cffi build of the fanotify system calls (fanotify/csrc/kabi.c). API mode: the compiler supplies every constant."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    #define FAN_CLASS_PRE_CONTENT ...
    #define FAN_CLOEXEC ...
    #define FAN_NONBLOCK ...
    #define FAN_UNLIMITED_QUEUE ...
    #define FAN_UNLIMITED_MARKS ...
    #define FAN_REPORT_FD_ERROR ...
    #define FAN_MARK_ADD ...
    #define FAN_MARK_REMOVE ...
    #define FAN_PRE_ACCESS ...
    #define FAN_Q_OVERFLOW ...
    #define FAN_ALLOW ...
    #define FAN_DENY ...
    #define FAN_ERRNO_SHIFT ...
    #define FAN_EVENT_INFO_TYPE_RANGE ...
    #define FANOTIFY_METADATA_VERSION ...

    struct fanotify_event_metadata {
        uint32_t event_len; uint8_t vers; uint8_t reserved; uint16_t metadata_len;
        uint64_t mask; int32_t fd; int32_t pid; ...;
    };
    struct fanotify_event_info_header { uint8_t info_type; uint8_t pad; uint16_t len; ...; };
    struct eod_event_info_range {
        struct fanotify_event_info_header hdr; uint32_t pad; uint64_t offset; uint64_t count;
    };
    struct fanotify_response { int32_t fd; uint32_t response; ...; };

    int eod_fanotify_init(unsigned int flags, unsigned int event_flags);
    int eod_fanotify_mark(int group, unsigned int flags, uint64_t mask, const char *path);
    int eod_fanotify_mark_fd(int group, unsigned int flags, uint64_t mask, int fd);
    """
)
ffibuilder.set_source(
    "fanotify._kabi",
    '#include "kabi.h"',
    sources=["fanotify/csrc/kabi.c"],
    include_dirs=["fanotify/csrc"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
