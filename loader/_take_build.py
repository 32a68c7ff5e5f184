"""cffi build of the end of a range request (loader/csrc/take.c). API mode; with the format code's sha256."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    enum eod_taken { EOD_ODD, EOD_WHOLE, EOD_RIGHT, EOD_WRITTEN };
    enum eod_taken eod_take(int connection, uint8_t *buffer, size_t room, uint64_t first, uint64_t last,
                            uint32_t patience, const uint8_t *digest, int file, uint64_t place, uint64_t *out);
    int eod_is_plain(const uint8_t *head, size_t length, uint64_t first, uint64_t last);
    """
)
ffibuilder.set_source(
    "loader._take",
    '#include "take.h"',
    sources=["loader/csrc/take.c", "erofs_builder/csrc/sha256.c"],
    include_dirs=["loader/csrc", "erofs_builder/csrc"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
