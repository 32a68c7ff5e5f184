"""cffi build of the mount system calls (mounts/csrc/kabi.c). API mode: the compiler supplies every constant."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    #define MNT_DETACH ...
    #define UMOUNT_NOFOLLOW ...
    #define FSOPEN_CLOEXEC ...
    #define FSMOUNT_CLOEXEC ...
    #define MOUNT_ATTR_RDONLY ...
    #define MOUNT_ATTR_NOSUID ...
    #define MOUNT_ATTR_NODEV ...
    #define MOUNT_ATTR_NOEXEC ...
    #define EOD_EROFS_MAGIC ...

    int eod_fsopen(const char *type, unsigned int flags);
    int eod_fsconfig_string(int fd, const char *key, const char *value);
    int eod_fsconfig_flag(int fd, const char *key);
    int eod_fsconfig_create(int fd);
    int eod_fsmount(int fd, unsigned int flags, unsigned int attributes);
    int eod_move_mount(int fd, const char *target);
    int eod_umount2(const char *target, int flags);
    int eod_is_mount_namespace(int fd);
    int eod_enter_mount_namespace(int fd);
    """
)
ffibuilder.set_source(
    "mounts._kabi",
    '#include "kabi.h"',
    sources=["mounts/csrc/kabi.c"],
    include_dirs=["mounts/csrc"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    print(Path(ffibuilder.compile(verbose=True)))
