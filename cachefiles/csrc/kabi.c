/* One function an ioctl; 0, or -errno. */
#include "kabi.h"

#include <errno.h>
#include <sys/ioctl.h>

int eod_read_complete(int fd, uint32_t msg_id)
{
	return ioctl(fd, CACHEFILES_IOC_READ_COMPLETE, (unsigned long)msg_id) < 0 ? -errno : 0;
}
