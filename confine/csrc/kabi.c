/* Capabilities, no_new_privs and Landlock of the calling thread. The numbers are written out where they are younger than
 * the oldest headers that this must build with (Linux 6.1). */
#include "kabi.h"

#include <errno.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	WRITE_FILE = 1 << 1,
	REMOVE_DIR = 1 << 4,
	REMOVE_FILE = 1 << 5,
	MAKE_CHAR = 1 << 6,
	MAKE_DIR = 1 << 7,
	MAKE_REG = 1 << 8,
	MAKE_SOCK = 1 << 9,
	MAKE_FIFO = 1 << 10,
	MAKE_BLOCK = 1 << 11,
	MAKE_SYM = 1 << 12,
	REFER = 1 << 13,    /* ABI 2 */
	TRUNCATE = 1 << 14, /* ABI 3 */
	SCOPE_ABSTRACT_SOCKETS = 1 << 0, /* ABI 6 */
	SCOPE_SIGNALS = 1 << 1,
};

struct ruleset {
	uint64_t fs, net, scoped;
};

struct beneath {
	uint64_t access;
	int32_t parent;
} __attribute__((packed));

static int result(long value)
{
	return value < 0 ? -errno : (int)value;
}

int eod_no_new_privs(void)
{
	return result(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

int eod_drop_capabilities(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};

	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	for (int capability = 0; capability < 64; capability++)
		prctl(PR_CAPBSET_DROP, capability, 0, 0, 0); /* where CAP_SETPCAP is there; no_new_privs does the same */
	return result(syscall(SYS_capset, &header, none));
}

int eod_landlock_abi(void)
{
	return result(syscall(SYS_landlock_create_ruleset, (void *)0, 0, 1));
}

static uint64_t writes(int abi)
{
	uint64_t access = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER;

	return abi >= 3 ? access | TRUNCATE : access;
}

int eod_landlock_create(int abi)
{
	struct ruleset ruleset = {
		.fs = writes(abi) | MAKE_CHAR | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK | MAKE_SYM,
		.scoped = abi >= 6 ? SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS : 0,
	};

	/* Older kernels know a shorter structure. */
	return result(syscall(SYS_landlock_create_ruleset, &ruleset, abi >= 6 ? 24 : 8, 0));
}

static int add(int ruleset, uint64_t access, int parent)
{
	struct beneath rule = {access, parent};

	return result(syscall(SYS_landlock_add_rule, ruleset, 1, &rule, 0));
}

int eod_landlock_allow_writes(int ruleset, int abi, int directory)
{
	return add(ruleset, writes(abi), directory);
}

int eod_landlock_allow_file_writes(int ruleset, int file)
{
	return add(ruleset, WRITE_FILE, file);
}

int eod_landlock_restrict(int ruleset)
{
	return result(syscall(SYS_landlock_restrict_self, ruleset, 0));
}
