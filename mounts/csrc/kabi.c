/* One function a system call. The commands of fsconfig are written as numbers: glibc has them as an enum only. */
#define _GNU_SOURCE
#include "kabi.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { SET_FLAG = 0, SET_STRING = 1, CMD_CREATE = 6 };

static int result(long value)
{
	return value < 0 ? -errno : (int)value;
}

int eod_fsopen(const char *type, unsigned int flags)
{
	return result(syscall(SYS_fsopen, type, flags));
}

int eod_fsconfig_string(int fd, const char *key, const char *value)
{
	return result(syscall(SYS_fsconfig, fd, SET_STRING, key, value, 0));
}

int eod_fsconfig_flag(int fd, const char *key)
{
	return result(syscall(SYS_fsconfig, fd, SET_FLAG, key, (void *)0, 0));
}

int eod_fsconfig_create(int fd)
{
	return result(syscall(SYS_fsconfig, fd, CMD_CREATE, (void *)0, (void *)0, 0));
}

int eod_fsmount(int fd, unsigned int flags, unsigned int attributes)
{
	return result(syscall(SYS_fsmount, fd, flags, attributes));
}

int eod_move_mount(int fd, const char *target)
{
	return result(syscall(SYS_move_mount, fd, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH));
}

int eod_umount2(const char *target, int flags)
{
	return umount2(target, flags) < 0 ? -errno : 0;
}

int eod_is_mount_namespace(int fd)
{
	struct statfs found;

	if (fstatfs(fd, &found) < 0 || found.f_type != NSFS_MAGIC)
		return 0;
	return ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNS;
}

/* For the calling thread alone, which first needs a root and a working directory of its own. */
int eod_enter_mount_namespace(int fd)
{
	if (unshare(CLONE_FS) < 0)
		return -errno;
	return setns(fd, CLONE_NEWNS) < 0 ? -errno : 0;
}
