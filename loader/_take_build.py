"""cffi build of the end of a range request (loader/csrc/take.c). API mode; the format code's sha256 and libzstd."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    typedef ... ZSTD_DCtx;
    ZSTD_DCtx *ZSTD_createDCtx(void);
    size_t ZSTD_freeDCtx(ZSTD_DCtx *);

    #define EOD_LONGEST_HEAD ...
    enum eod_taken { EOD_ODD, EOD_WHOLE, EOD_RIGHT, EOD_WRITTEN };
    struct eod_answer {
        uint8_t *buffer;
        size_t room;
        uint8_t *plain;
        size_t plain_room;
        ZSTD_DCtx *decoder;
        uint64_t have, body, passed, began, came;
        ...;
    };
    void eod_begin(struct eod_answer *answer, int connection, uint64_t first, uint64_t last, uint32_t patience);
    enum eod_taken eod_take(struct eod_answer *answer, uint64_t length, const uint8_t *digest, uint64_t decoded,
                            int file, uint64_t place);
    int eod_is_plain(const uint8_t *head, size_t length, uint64_t first, uint64_t last);
    """
)
ffibuilder.set_source(
    "loader._take",
    '#include "take.h"',
    sources=["loader/csrc/take.c", "erofs_builder/csrc/sha256.c"],
    include_dirs=["loader/csrc", "erofs_builder/csrc"],
    libraries=["zstd"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
