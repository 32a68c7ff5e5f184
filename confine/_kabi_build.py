"""cffi build of what confines a process (confine/csrc). API mode: the compiler supplies every number."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    int eod_no_new_privs(void);
    int eod_drop_capabilities(void);
    int eod_landlock_abi(void);
    int eod_landlock_create(int abi);
    int eod_landlock_allow_writes(int ruleset, int abi, int directory);
    int eod_landlock_allow_file_writes(int ruleset, int file);
    int eod_landlock_restrict(int ruleset);
    int eod_filter_system_calls(void);
    """
)
ffibuilder.set_source(
    "confine._kabi",
    '#include "kabi.h"',
    sources=["confine/csrc/kabi.c", "confine/csrc/seccomp.c"],
    include_dirs=["confine/csrc"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
