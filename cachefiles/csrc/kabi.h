/* What cachefiles/_kabi needs of the kernel's headers. */
#ifndef CACHEFILES_KABI_H
#define CACHEFILES_KABI_H

#include <linux/cachefiles.h>
#include <stdint.h>

int eod_read_complete(int fd, uint32_t msg_id);

#endif
