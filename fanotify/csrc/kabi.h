/* What fanotify/_kabi needs of the kernel's headers, with fallbacks: distributions' headers lag behind the kernel. */
#ifndef FANOTIFY_KABI_H
#define FANOTIFY_KABI_H

#include <linux/fanotify.h>
#include <stdint.h>

#ifndef FAN_PRE_ACCESS /* 6.14 */
#define FAN_PRE_ACCESS 0x00100000
#endif
#ifndef FAN_REPORT_FD_ERROR /* 6.13 */
#define FAN_REPORT_FD_ERROR 0x00002000
#endif
#ifndef FAN_EVENT_INFO_TYPE_RANGE /* 6.14 */
#define FAN_EVENT_INFO_TYPE_RANGE 6
#endif
#ifndef FAN_ERRNO_SHIFT /* 6.14: FAN_DENY with an errno */
#define FAN_ERRNO_SHIFT 24
#endif

/* struct fanotify_event_info_range of 6.14, under a name of ours for headers without it */
struct eod_event_info_range {
	struct fanotify_event_info_header hdr;
	uint32_t pad;
	uint64_t offset;
	uint64_t count;
};

int eod_fanotify_init(unsigned int flags, unsigned int event_flags);
int eod_fanotify_mark(int group, unsigned int flags, uint64_t mask, const char *path);
int eod_fanotify_mark_fd(int group, unsigned int flags, uint64_t mask, int fd);

#endif
