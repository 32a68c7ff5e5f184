/* The system calls that a process may make which has network, files and threads, but nothing to administrate. What is
 * not listed fails with EPERM; what is younger than this list with ENOSYS, so that libraries fall back. */
#include "kabi.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#define ARCH 0
#endif

#define CLONE_NEW_ANYTHING 0x7e020000u
#define YOUNG 424 /* from here on all architectures number alike */
#define ARGUMENT(n) ((unsigned int)(offsetof(struct seccomp_data, args) + 8 * (n))) /* its low half */
#define DENY(number) (SECCOMP_RET_ERRNO | (number))

static const int allowed[] = {
	/* files, as descriptors and by name; no owner, mode, time or attribute is changed */
	SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev, SYS_preadv2,
	SYS_pwritev2, SYS_openat, SYS_close, SYS_fstat, SYS_newfstatat, SYS_statx, SYS_statfs, SYS_fstatfs, SYS_faccessat,
	SYS_lseek, SYS_dup, SYS_dup3, SYS_fcntl, SYS_flock, SYS_fsync, SYS_fdatasync, SYS_sync_file_range, SYS_ftruncate,
	SYS_truncate, SYS_fallocate, SYS_fadvise64, SYS_readahead, SYS_getdents64, SYS_getcwd, SYS_chdir, SYS_fchdir,
	SYS_renameat2, SYS_mkdirat, SYS_unlinkat, SYS_linkat, SYS_readlinkat, SYS_sendfile, SYS_copy_file_range,
	SYS_splice, SYS_getxattr, SYS_lgetxattr, SYS_fgetxattr, SYS_umask, SYS_memfd_create,
	SYS_close_range, SYS_faccessat2, SYS_openat2,
#ifdef SYS_renameat
	SYS_renameat,
#endif
#ifdef SYS_open
	SYS_open, SYS_stat, SYS_lstat, SYS_access, SYS_dup2, SYS_getdents, SYS_rename, SYS_mkdir, SYS_rmdir, SYS_unlink,
	SYS_link, SYS_readlink, SYS_creat,
#endif
	/* waiting */
	SYS_ppoll, SYS_pselect6, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_eventfd2, SYS_pipe2,
	SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime, SYS_nanosleep, SYS_clock_nanosleep,
#ifdef SYS_poll
	SYS_poll, SYS_select, SYS_epoll_create, SYS_epoll_wait, SYS_eventfd, SYS_pipe, SYS_alarm, SYS_pause,
#endif
	/* memory */
	SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_madvise, SYS_msync, SYS_mincore, SYS_brk, SYS_mlock, SYS_munlock,
	SYS_mlock2, SYS_membarrier,
	/* network; socket, socketpair below */
	SYS_connect, SYS_bind, SYS_listen, SYS_accept, SYS_accept4, SYS_getsockname, SYS_getpeername, SYS_setsockopt,
	SYS_getsockopt, SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg, SYS_shutdown,
	/* threads and children; clone below */
	SYS_execve, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid, SYS_kill, SYS_tkill, SYS_tgkill, SYS_pidfd_open,
	SYS_pidfd_send_signal, SYS_futex, SYS_set_tid_address, SYS_set_robust_list, SYS_get_robust_list, SYS_rseq,
	SYS_sched_yield, SYS_sched_getaffinity, SYS_sched_getparam, SYS_sched_getscheduler, SYS_sched_get_priority_max,
	SYS_sched_get_priority_min, SYS_setpgid, SYS_setsid, SYS_getpgid, SYS_getsid, SYS_prctl,
#ifdef SYS_fork
	SYS_fork, SYS_vfork, SYS_getpgrp, SYS_arch_prctl,
#endif
	/* signals, clocks, who and where one is */
	SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigpending, SYS_rt_sigsuspend, SYS_rt_sigtimedwait,
	SYS_rt_sigqueueinfo, SYS_sigaltstack, SYS_restart_syscall, SYS_clock_gettime, SYS_clock_getres, SYS_gettimeofday,
	SYS_times, SYS_getitimer, SYS_setitimer, SYS_timer_create, SYS_timer_settime, SYS_timer_gettime, SYS_timer_delete,
	SYS_getpid, SYS_getppid, SYS_gettid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_getresuid, SYS_getresgid,
	SYS_getgroups, SYS_uname, SYS_sysinfo, SYS_getrusage, SYS_getrandom, SYS_getcpu, SYS_capget, SYS_getpriority,
#ifdef SYS_getrlimit
	SYS_getrlimit, SYS_setrlimit,
#endif
#ifdef SYS_time
	SYS_time,
#endif
};

enum { COUNT = sizeof(allowed) / sizeof(allowed[0]), LONGEST = 64 + 2 * COUNT };

struct program {
	struct sock_filter code[LONGEST];
	unsigned short length;
};

static void emit(struct program *to, unsigned short code, unsigned char yes, unsigned char no, unsigned int value)
{
	struct sock_filter instruction = {code, yes, no, value};

	to->code[to->length++] = instruction;
}

static void load(struct program *to, unsigned int offset)
{
	emit(to, BPF_LD | BPF_W | BPF_ABS, 0, 0, offset);
}

static void answer(struct program *to, unsigned int value)
{
	emit(to, BPF_RET | BPF_K, 0, 0, value);
}

/* If what is loaded equals `value`: answer. */
static void when(struct program *to, unsigned int value, unsigned int with)
{
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, value);
	answer(to, with);
}

/* socket: only families that reach a registry. A Unix socket would reach every other service of the machine. */
static void check_sockets(struct program *to)
{
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 6, SYS_socket);
	load(to, ARGUMENT(0));
	when(to, AF_INET, SECCOMP_RET_ALLOW);
	when(to, AF_INET6, SECCOMP_RET_ALLOW);
	answer(to, DENY(EAFNOSUPPORT));
	/* Of a pair, a datagram socket could be connected anew. */
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 5, SYS_socketpair);
	load(to, ARGUMENT(1));
	emit(to, BPF_ALU | BPF_AND | BPF_K, 0, 0, 0xf);
	when(to, SOCK_STREAM, SECCOMP_RET_ALLOW);
	answer(to, DENY(EAFNOSUPPORT));
}

/* Threads and processes, but no namespaces; one's own limits; no characters into somebody's terminal. */
static void check_arguments(struct program *to)
{
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, SYS_clone);
	load(to, ARGUMENT(0));
	emit(to, BPF_JMP | BPF_JSET | BPF_K, 0, 1, CLONE_NEW_ANYTHING);
	answer(to, DENY(EPERM));
	answer(to, SECCOMP_RET_ALLOW);
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, SYS_prlimit64);
	load(to, ARGUMENT(0));
	when(to, 0, SECCOMP_RET_ALLOW);
	answer(to, DENY(EPERM));
	emit(to, BPF_JMP | BPF_JEQ | BPF_K, 0, 6, SYS_ioctl);
	load(to, ARGUMENT(1));
	when(to, 0x5412 /* TIOCSTI */, DENY(EPERM));
	when(to, 0x541c /* TIOCLINUX */, DENY(EPERM));
	answer(to, SECCOMP_RET_ALLOW);
}

int eod_filter_system_calls(void)
{
	struct program program = {.length = 0};
	struct sock_fprog filter = {0, program.code};

	if (!ARCH)
		return -EOPNOTSUPP;
	load(&program, offsetof(struct seccomp_data, arch));
	emit(&program, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ARCH);
	answer(&program, SECCOMP_RET_KILL_PROCESS);
	load(&program, offsetof(struct seccomp_data, nr));
	for (int i = 0; i < COUNT; i++)
		when(&program, (unsigned int)allowed[i], SECCOMP_RET_ALLOW);
	check_sockets(&program);
	check_arguments(&program);
	emit(&program, BPF_JMP | BPF_JGE | BPF_K, 0, 1, YOUNG);
	answer(&program, DENY(ENOSYS));
	answer(&program, DENY(EPERM));
	filter.len = program.length;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) < 0 ? -errno : 0;
}
