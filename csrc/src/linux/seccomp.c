/* seccomp.c - the allow-list of system calls, as a classic BPF program.
 *
 * Form:  foreign architecture -> kill;  x32 -> kill;
 *        calls that are judged by an argument, each with its own return;
 *        a search by halves among the calls that are always allowed;  everything else -> EPERM.
 * For a call that is allowed whatever its arguments, the kernel (5.11 and later) finds that out
 * once, when the filter is set, and does not run the program again. It tries every number there
 * is, hence the search: 80 comparisons in a row would be the longest part of closing a sandbox.
 * A pointer argument cannot be judged: what it points to can change. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#endif

#define X32_BIT 0x40000000u
#define MAX_PROGRAM 256
#define MAX_DENIED 200
#define SEARCH_LEAF 4 /* calls that are compared one after the other */

/* prctl options, by number where system headers may lack them. */
#define OPT_GET_DUMPABLE 3u
#define OPT_SET_NAME 15u
#define OPT_GET_NAME 16u
#define OPT_GET_SECCOMP 21u
#define OPT_GET_NO_NEW_PRIVS 39u
#define OPT_SET_VMA 0x53564d41u

/* For sealed memory: linux/userfaultfd.h, linux/memfd.h and bits/mman-shared.h may be older. The
 * requests are _IOWR(0xAA, number, size of the structure). */
#define UFFD_USER_MODE_ONLY_FLAG 1u
#define FAULTS_API 0xC018AA3Fu
#define FAULTS_REGISTER 0xC020AA00u
#define FAULTS_ZEROPAGE 0xC020AA04u
#define FAULTS_CONTINUE 0xC020AA07u
#define MFD_CLOEXEC_FLAG 1u
#define MFD_ALLOW_SEALING_FLAG 2u
#define MFD_NOEXEC_SEAL_FLAG 8u
#define MADV_DONTNEED_LOCKED_NUMBER 24u
#define MLOCK_ONFAULT_FLAG 1u

/* What pthread_create asks of clone, in glibc; musl adds CLONE_DETACHED. Nothing less than a
 * thread, nothing more: no process, no namespace. */
#define THREAD_FLAGS                                                                               \
    ((unsigned int)(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |             \
                    CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID))
#define THREAD_FLAGS_FREE ((unsigned int)CLONE_DETACHED)

typedef struct {
    struct sock_filter code[MAX_PROGRAM];
    unsigned short len;
} program_t;

static const uint16_t always[] = {
    /* descriptors that are open already */
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev,
    SYS_recvmsg, SYS_sendmsg, SYS_recvfrom, SYS_sendto, SYS_shutdown, SYS_close, SYS_lseek,
    SYS_fstat, SYS_ftruncate, SYS_ppoll, SYS_pselect6, SYS_epoll_pwait, SYS_epoll_ctl,
    SYS_epoll_create1,
#if defined(__x86_64__)
    SYS_poll, SYS_select, SYS_epoll_wait,
#endif
    /* memory; secret memory can be made at any time */
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_msync, SYS_mlock, SYS_munlock,
    PYE_NR_MEMFD_SECRET,
    /* threads, waiting, time */
    SYS_futex, SYS_sched_yield, SYS_sched_getaffinity, SYS_getcpu, SYS_set_robust_list, PYE_NR_RSEQ,
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday,
    SYS_restart_syscall,
#if defined(__x86_64__)
    SYS_time,
#endif
    /* signals of one's own */
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack,
    /* who and where one is; randomness; the end */
    SYS_getpid, SYS_gettid, SYS_getppid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
    SYS_uname, SYS_getcwd, PYE_NR_GETRANDOM, SYS_exit, SYS_exit_group,
};

static void put(program_t *program, uint16_t code, uint32_t operand, uint8_t yes, uint8_t no)
{
    if (program->len < MAX_PROGRAM) {
        program->code[program->len] = (struct sock_filter){code, yes, no, operand};
    }
    program->len++; /* beyond the end: noticed before the program is used */
}

static void put_return(program_t *program, uint32_t action)
{
    put(program, BPF_RET | BPF_K, action, 0, 0);
}

static void put_load(program_t *program, size_t offset)
{
    put(program, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static uint32_t error_action(int error)
{
    return SECCOMP_RET_ERRNO | ((uint32_t)error & SECCOMP_RET_DATA);
}

/* Offset of the low (half 0) or high half of an argument; both machines are little-endian. */
static size_t argument(unsigned int index, unsigned int half)
{
    return offsetof(struct seccomp_data, args) + 8 * (size_t)index + 4 * (size_t)half;
}

/* Opens a block that runs for call `number` only and must end with a return. The accumulator
 * holds the call's number again behind it, because only this call came in. */
static unsigned short open_block(program_t *program, uint32_t number)
{
    put(program, BPF_JMP | BPF_JEQ | BPF_K, number, 0, 0);
    return (unsigned short)(program->len - 1);
}

static void close_block(program_t *program, unsigned short start)
{
    if (start < MAX_PROGRAM) {
        program->code[start].jf = (uint8_t)(program->len - start - 1);
    }
}

/* Allows call `number` if argument `index` is one of `values`, else EPERM. */
static void allow_values(program_t *program, uint32_t number, unsigned int index,
                         const uint32_t *values, uint8_t num_values)
{
    const unsigned short start = open_block(program, number);

    put_load(program, argument(index, 0));
    for (uint8_t i = 0; i < num_values; i++) {
        put(program, BPF_JMP | BPF_JEQ | BPF_K, values[i], (uint8_t)(num_values - i), 0);
    }
    put_return(program, error_action(EPERM));
    put_return(program, SECCOMP_RET_ALLOW);
    close_block(program, start);
}

/* Allows call `number` unless argument `index` has a bit of `bits`. */
static void allow_without_bits(program_t *program, uint32_t number, unsigned int index,
                               uint32_t bits)
{
    const unsigned short start = open_block(program, number);

    put_load(program, argument(index, 0));
    put(program, BPF_JMP | BPF_JSET | BPF_K, bits, 0, 1);
    put_return(program, error_action(EPERM));
    put_return(program, SECCOMP_RET_ALLOW);
    close_block(program, start);
}

static void put_faults(program_t *program)
{
    static const uint32_t faults[] = {(uint32_t)O_CLOEXEC | UFFD_USER_MODE_ONLY_FLAG};

    allow_values(program, PYE_NR_USERFAULTFD, 0, faults, 1);
}

/* What the pager of sealed memory needs, for a process that asked for it. A descriptor of
 * userfaultfd could be opened before and kept, but whoever holds one can do all that is done with
 * several, and every spare would hold one; so only those processes open one that make a heap, and
 * the requests that make it useful are theirs alone. With USER_MODE_ONLY a fault of the kernel is
 * never held up, which is what attacks on kernels use these descriptors for. A memory file cannot become executable here (mmap, MDWE,
 * execveat); the only process that can be given advice is this one, for no other can be named. */
static void put_sealed(program_t *program)
{
    static const uint32_t files[] = {
        MFD_CLOEXEC_FLAG | MFD_ALLOW_SEALING_FLAG,
        MFD_CLOEXEC_FLAG | MFD_ALLOW_SEALING_FLAG | MFD_NOEXEC_SEAL_FLAG};
    static const uint32_t advices[] = {MADV_DONTNEED, MADV_DONTNEED_LOCKED_NUMBER};
    static const uint32_t locks[] = {MLOCK_ONFAULT_FLAG};
    const uint32_t self[] = {(uint32_t)getpid()};

    put_faults(program);
    allow_values(program, PYE_NR_MEMFD_CREATE, 1, files, 2);
    allow_values(program, PYE_NR_PIDFD_OPEN, 0, self, 1);
    allow_values(program, PYE_NR_PROCESS_MADVISE, 3, advices, 2);
    allow_values(program, PYE_NR_MLOCK2, 2, locks, 1);
}

static void put_threads(program_t *program)
{
    unsigned short start = open_block(program, SYS_clone);

    put_load(program, argument(0, 0));
    put(program, BPF_ALU | BPF_AND | BPF_K, ~THREAD_FLAGS_FREE, 0, 0);
    put(program, BPF_JMP | BPF_JEQ | BPF_K, THREAD_FLAGS, 1, 0);
    put_return(program, error_action(EPERM));
    put_return(program, SECCOMP_RET_ALLOW);
    close_block(program, start);

    /* Its flags are behind a pointer. ENOSYS sends the C library to clone. */
    start = open_block(program, PYE_NR_CLONE3);
    put_return(program, error_action(ENOSYS));
    close_block(program, start);
}

/* prlimit64(0, any, NULL, out): reading one's own limits. */
static void put_limits(program_t *program)
{
    const unsigned short start = open_block(program, SYS_prlimit64);

    put_load(program, argument(0, 0));
    put(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 4);
    put_load(program, argument(2, 0));
    put(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2);
    put_load(program, argument(2, 1));
    put(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
    put_return(program, error_action(EPERM));
    put_return(program, SECCOMP_RET_ALLOW);
    close_block(program, start);
}

static void put_head(program_t *program, uint32_t arch)
{
    program->len = 0;
    put_load(program, offsetof(struct seccomp_data, arch));
    put(program, BPF_JMP | BPF_JEQ | BPF_K, arch, 1, 0);
    put_return(program, SECCOMP_RET_KILL_PROCESS);
    put_load(program, offsetof(struct seccomp_data, nr));
#if defined(__x86_64__)
    put(program, BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1);
    put_return(program, SECCOMP_RET_KILL_PROCESS);
#endif
}

static int compare_calls(const void *left, const void *right)
{
    return (int)*(const uint16_t *)left - (int)*(const uint16_t *)right;
}

/* Allows the calls of `calls` (ascending) and ends with a return for every other number. */
static void put_search(program_t *program, const uint16_t *calls, size_t num_calls)
{
    const size_t half = num_calls / 2;
    unsigned short start;

    if (num_calls <= SEARCH_LEAF) {
        for (size_t i = 0; i < num_calls; i++) {
            put(program, BPF_JMP | BPF_JEQ | BPF_K, calls[i], (uint8_t)(num_calls - i), 0);
        }
        put_return(program, error_action(EPERM));
        put_return(program, SECCOMP_RET_ALLOW);
        return;
    }
    put(program, BPF_JMP | BPF_JGE | BPF_K, calls[half], 0, 0);
    start = (unsigned short)(program->len - 1);
    put_search(program, calls, half);
    if (program->len - start - 1 > UINT8_MAX) {
        program->len = MAX_PROGRAM + 1; /* too far for a jump: noticed before it is used */
        return;
    }
    if (start < MAX_PROGRAM) {
        program->code[start].jt = (uint8_t)(program->len - start - 1);
    }
    put_search(program, calls + half, num_calls - half);
}

static pye_status install(const program_t *program, unsigned int flags)
{
    struct sock_fprog fprog = {.len = program->len, .filter = NULL};
    struct sock_filter code[MAX_PROGRAM];
    long result;

    PYE_REFUSE_IF(program->len > MAX_PROGRAM, PYE_E_STATE);
    for (unsigned short i = 0; i < program->len; i++) {
        code[i] = program->code[i];
    }
    fprog.filter = code;
    result = syscall(PYE_NR_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, &fprog);
    /* A thread that has another filter cannot be brought in line. */
    if (PYE_GUARD(result > 0)) {
        errno = ESRCH;
        return PYE_E_STATE;
    }
    return pye_os_result(result);
}

pye_status pye_sandbox_seccomp(uint32_t flags)
{
#if defined(NATIVE_ARCH)
    static const uint32_t options[] = {OPT_GET_DUMPABLE,     OPT_SET_NAME, OPT_GET_NAME,
                                       OPT_GET_SECCOMP,      OPT_SET_VMA,
                                       OPT_GET_NO_NEW_PRIVS};
    /* Python's mmap keeps a duplicate; its sockets ask for and set O_NONBLOCK. */
    static const uint32_t controls[] = {F_GETFD,     F_SETFD,         F_GETFL,    F_SETFL,
                                        F_GET_SEALS, F_DUPFD_CLOEXEC, F_ADD_SEALS};
    static const uint32_t requests[] = {FIONBIO, FAULTS_API, FAULTS_REGISTER, FAULTS_CONTINUE,
                                        FAULTS_ZEROPAGE};
    static const uint32_t stat_flags[] = {AT_EMPTY_PATH};
    const uint32_t self[] = {(uint32_t)getpid()};
    const uint32_t exec = (flags & PYE_SECCOMP_JIT) != 0 ? 0 : PROT_EXEC;
    const int sealed = (flags & PYE_SECCOMP_SEALED) != 0;
    uint16_t calls[sizeof(always) / sizeof(always[0])];
    program_t program;

    PYE_REFUSE_IF((flags & ~(uint32_t)(PYE_SECCOMP_JIT | PYE_SECCOMP_SEALED)) != 0,
                  PYE_E_ARGUMENT);
    put_head(&program, NATIVE_ARCH);
    allow_without_bits(&program, SYS_mmap, 2, exec);
    allow_without_bits(&program, SYS_mprotect, 2, exec);
    /* The last ones of both lists are the pager's. */
    allow_values(&program, SYS_ioctl, 1, requests, sealed ? 5 : 1);
    allow_values(&program, SYS_fcntl, 1, controls, sealed ? 7 : 6);
    if (sealed) {
        put_sealed(&program);
    }
    allow_values(&program, SYS_prctl, 0, options, sizeof(options) / sizeof(options[0]));
    /* fstat is newfstatat(fd, "", AT_EMPTY_PATH) in many C libraries. The path could name a file;
     * then its size and dates are all that can be learnt. */
    allow_values(&program, SYS_newfstatat, 3, stat_flags, 1);
    allow_values(&program, SYS_tgkill, 0, self, 1); /* raise, abort, pthread_kill */
    put_threads(&program);
    put_limits(&program);
    memcpy(calls, always, sizeof(calls));
    qsort(calls, sizeof(calls) / sizeof(calls[0]), sizeof(calls[0]), compare_calls);
    put_search(&program, calls, sizeof(calls) / sizeof(calls[0]));
    return install(&program, SECCOMP_FILTER_FLAG_TSYNC);
#else
    (void)flags;
    (void)always;
    errno = ENOSYS;
    return PYE_E_UNSUPPORTED;
#endif
}

/* What code of an image could use while it loads to reach past Landlock, which knows neither modes,
 * owners, times and attributes of files, nor sockets with a path (a session's bus starts programs);
 * or to become another program, to look into others, or to leave the filters' reach. */
static const uint16_t not_while_loading[] = {
    SYS_connect, SYS_bind, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat,
    SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr, SYS_removexattr, SYS_lremovexattr,
    SYS_fremovexattr, SYS_execve, PYE_NR_EXECVEAT, SYS_ptrace, SYS_process_vm_readv,
    SYS_process_vm_writev, PYE_NR_PIDFD_GETFD, SYS_keyctl, SYS_add_key, SYS_request_key,
    SYS_unshare, SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, PYE_NR_BPF,
    SYS_perf_event_open, SYS_personality, SYS_name_to_handle_at,
    SYS_open_by_handle_at,
    /* io_uring_setup, _enter, _register; open_tree, move_mount, fsopen, fsmount; mount_setattr */
    425, 426, 427, 428, 429, 430, 432, 442,
    452, /* fchmodat2 */
    463, 466, 469, /* setxattrat, removexattrat, file_setattr */
#if defined(__x86_64__)
    SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat,
#endif
};

pye_status pye_sandbox_seccomp_loading(void)
{
#if defined(NATIVE_ARCH)
    program_t program;
    const size_t count = sizeof(not_while_loading) / sizeof(not_while_loading[0]);

    put_head(&program, NATIVE_ARCH);
    /* This filter stays in force under the one that closes: what that allows, this must not refuse.
     * Which image it will be is not known yet. */
    put_faults(&program);
    for (size_t i = 0; i < count; i++) {
        put(&program, BPF_JMP | BPF_JEQ | BPF_K, not_while_loading[i], (uint8_t)(count - i), 0);
    }
    put_return(&program, SECCOMP_RET_ALLOW);
    put_return(&program, error_action(EPERM));
    return install(&program, SECCOMP_FILTER_FLAG_TSYNC);
#else
    (void)not_while_loading;
    errno = ENOSYS;
    return PYE_E_UNSUPPORTED;
#endif
}

pye_status pye_seccomp_deny(const int *calls, size_t num_calls, int error_number)
{
    program_t program;

    PYE_REFUSE_IF(num_calls > MAX_DENIED || error_number < 1 || error_number > 4095,
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF(prctl(PR_SET_NO_NEW_PRIVS, 1L, 0L, 0L, 0L) != 0, pye_os_status(errno));
    program.len = 0;
    put_load(&program, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < num_calls; i++) {
        put(&program, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i], (uint8_t)(num_calls - i), 0);
    }
    put_return(&program, SECCOMP_RET_ALLOW);
    put_return(&program, error_action(error_number));
    return install(&program, SECCOMP_FILTER_FLAG_TSYNC);
}

#endif
