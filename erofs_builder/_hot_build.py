"""cffi build of the format code's hot loops (erofs_builder/csrc/hot.c). API mode."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    uint32_t eod_crc32c(uint32_t state, const uint8_t *data, size_t length);
    int eod_tar_header(const uint8_t *block, int64_t *out);
    int eod_tar_scan(const uint8_t *data, size_t length, int64_t *out, int limit);
    int eod_sha256_lanes(void);
    void eod_sha256_many(const uint8_t *data, const uint64_t *places, size_t count, uint8_t *digests);
    void eod_sha256_beside(uint32_t *words, const uint8_t *stream, size_t stream_blocks, const uint8_t *data,
                           const uint64_t *places, size_t count, uint8_t *digests);
    void eod_keep_memory(void);
    """
)
ffibuilder.set_source(
    "erofs_builder._hot",
    '#include "hot.h"',
    sources=[f"erofs_builder/csrc/{name}.c" for name in ("hot", "tar", "memory", "sha256")],
    include_dirs=["erofs_builder/csrc"],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
