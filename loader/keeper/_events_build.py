"""cffi build of the keeper's way of an event (loader/keeper/csrc/events.c). API mode; with fanotify's ABI header."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    #define EOD_BLOCK ...
    #define EOD_JOURNAL_CAPACITY ...
    #define EOD_JOURNAL_START ...
    #define EOD_READERS_CAPACITY ...
    #define EOD_REQUEST ...
    #define EOD_TELL ...
    enum eod_kind { EOD_OTHER, EOD_PRESENT, EOD_PENDING, EOD_SENT, EOD_TOLD, EOD_REPEAT };
    struct eod_event {
        uint64_t mask, object, offset, length;
        int32_t fd, pid, kind, failed;
    };
    struct eod_rest {
        uint32_t begin, end;
        uint64_t told, repeats, repeated;
    };
    struct eod_plane;
    struct eod_plane *eod_plane_new(int group, uint8_t *journal, uint8_t *readers);
    void eod_plane_free(struct eod_plane *plane);
    int eod_plane_put(struct eod_plane *plane, uint64_t device, uint64_t inode, uint64_t object, uint64_t size,
                      int writer, const uint8_t *bitmaps, uint64_t bytes);
    void eod_plane_drop(struct eod_plane *plane, uint64_t device, uint64_t inode);
    void eod_plane_reader(struct eod_plane *plane, uint32_t thread, uint32_t slot);
    int eod_plane_take(struct eod_plane *plane, int worker, int epoll, uint32_t longest, uint64_t first,
                       uint8_t *buffer, size_t room, struct eod_event *events, struct eod_rest *rest);
    int eod_plane_allow(struct eod_plane *plane, int fd, int writer, uint32_t thread, uint64_t object, uint64_t offset,
                        uint64_t length);
    """
)
ffibuilder.set_source(
    "loader.keeper._events",
    '#include "events.h"',
    sources=["loader/keeper/csrc/events.c"],
    include_dirs=["loader/keeper/csrc", "fanotify/csrc"],
    define_macros=[("_GNU_SOURCE", None), ("_FILE_OFFSET_BITS", "64")],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
