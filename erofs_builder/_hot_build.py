"""cffi build of the format code's hot loops (erofs_builder/csrc/hot.c). API mode."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    uint32_t eod_crc32c(uint32_t state, const uint8_t *data, size_t length);
    int eod_tar_header(const uint8_t *block, int64_t *out);
    int eod_tar_scan(const uint8_t *data, size_t length, int64_t *out, int limit);
    void eod_keep_memory(void);
    """
)
ffibuilder.set_source(
    "erofs_builder._hot",
    '#include "hot.h"',
    sources=["erofs_builder/csrc/hot.c", "erofs_builder/csrc/tar.c", "erofs_builder/csrc/memory.c"],
    include_dirs=["erofs_builder/csrc"],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
