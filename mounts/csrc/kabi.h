/* What mounts/_kabi needs of the kernel's headers. Functions return a descriptor or 0, or -errno. */
#ifndef MOUNTS_KABI_H
#define MOUNTS_KABI_H

#include <stdint.h>
#include <sys/mount.h>

#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
#endif
#ifndef MOUNT_ATTR_RDONLY
#define MOUNT_ATTR_RDONLY 0x00000001
#define MOUNT_ATTR_NOSUID 0x00000002
#define MOUNT_ATTR_NODEV 0x00000004
#define MOUNT_ATTR_NOEXEC 0x00000008
#endif
#ifndef FSOPEN_CLOEXEC
#define FSOPEN_CLOEXEC 1
#endif
#ifndef FSMOUNT_CLOEXEC
#define FSMOUNT_CLOEXEC 1
#endif
#ifndef UMOUNT_NOFOLLOW
#define UMOUNT_NOFOLLOW 8
#endif

#define EOD_EROFS_MAGIC 0xE0F5E1E2L

int eod_fsopen(const char *type, unsigned int flags);
int eod_fsconfig_string(int fd, const char *key, const char *value);
int eod_fsconfig_flag(int fd, const char *key);
int eod_fsconfig_create(int fd);
int eod_fsmount(int fd, unsigned int flags, unsigned int attributes);
int eod_move_mount(int fd, const char *target);
int eod_umount2(const char *target, int flags);
int eod_is_mount_namespace(int fd);
int eod_enter_mount_namespace(int fd);

#endif
