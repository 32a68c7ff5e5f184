/* One function a system call; descriptor or 0, or -errno. */
#include "kabi.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/fanotify.h>

static int result(int value)
{
	return value < 0 ? -errno : value;
}

int eod_fanotify_init(unsigned int flags, unsigned int event_flags)
{
	return result(fanotify_init(flags, event_flags));
}

int eod_fanotify_mark(int group, unsigned int flags, uint64_t mask, const char *path)
{
	return result(fanotify_mark(group, flags, mask, AT_FDCWD, path));
}

int eod_fanotify_mark_fd(int group, unsigned int flags, uint64_t mask, int fd)
{
	return result(fanotify_mark(group, flags, mask, fd, (const char *)0));
}
