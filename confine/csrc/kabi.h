/* What confine/_kabi needs of the kernel's headers. Functions return a value >= 0, or -errno. */
#ifndef CONFINE_KABI_H
#define CONFINE_KABI_H

#include <stdint.h>

int eod_no_new_privs(void);
int eod_drop_capabilities(void);
int eod_landlock_abi(void);
int eod_landlock_create(int abi);
int eod_landlock_allow_writes(int ruleset, int abi, int directory);
int eod_landlock_allow_file_writes(int ruleset, int file);
int eod_landlock_restrict(int ruleset);
int eod_filter_system_calls(void);

#endif
