#include "hot.h"

#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

void eod_keep_memory(void)
{
#ifdef __GLIBC__
	mallopt(M_MMAP_THRESHOLD, 32 << 20); /* the largest that it takes */
	mallopt(M_TRIM_THRESHOLD, 256 << 20);
	mallopt(M_TOP_PAD, 4 << 20);
#endif
}
