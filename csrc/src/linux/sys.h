/* sys.h - what the files of this folder share: errno to status, and numbers that older system
 * headers lack. System call numbers above 424 are the same on every architecture. */
/* Include it before any system header: it needs _GNU_SOURCE, which the including file defines. */
#ifndef PYE_SRC_LINUX_SYS_H
#define PYE_SRC_LINUX_SYS_H

#include "pyenclave/base.h"

#include <errno.h>

#define PYE_NR_PIDFD_SEND_SIGNAL 424
#define PYE_NR_PIDFD_OPEN 434
#define PYE_NR_CLOSE_RANGE 436
#define PYE_NR_PIDFD_GETFD 438
#define PYE_NR_PROCESS_MADVISE 440
#define PYE_NR_LANDLOCK_CREATE 444
#define PYE_NR_LANDLOCK_ADD_RULE 445
#define PYE_NR_LANDLOCK_RESTRICT 446
#define PYE_NR_MEMFD_SECRET 447
#define PYE_NR_FUTEX_WAITV 449

/* The headers of the oldest supported build system are those of Linux 3.10. */
#if defined(__linux__)
#include <fcntl.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define PYE_NR_RSEQ 334
#define PYE_NR_SECCOMP 317
#define PYE_NR_GETRANDOM 318
#define PYE_NR_MEMFD_CREATE 319
#define PYE_NR_MLOCK2 325
#define PYE_NR_BPF 321
#define PYE_NR_EXECVEAT 322
#define PYE_NR_USERFAULTFD 323
#define PYE_NR_MEMFD_CREATE 319
#define PYE_NR_MLOCK2 325
#define PYE_NR_MLOCK2 325
#else /* the common table: aarch64, riscv64 */
#define PYE_NR_RSEQ 293
#define PYE_NR_SECCOMP 277
#define PYE_NR_GETRANDOM 278
#define PYE_NR_MEMFD_CREATE 279
#define PYE_NR_MLOCK2 284
#define PYE_NR_BPF 280
#define PYE_NR_EXECVEAT 281
#define PYE_NR_USERFAULTFD 282
#define PYE_NR_MEMFD_CREATE 279
#define PYE_NR_MLOCK2 284
#define PYE_NR_MLOCK2 284
#endif
#define PYE_NR_CLONE3 435

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif
#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_DETACHED
#define CLONE_DETACHED 0x00400000
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#define F_SEAL_SEAL 1
#define F_SEAL_SHRINK 2
#define F_SEAL_GROW 4
#define F_SEAL_WRITE 8
#endif
#ifndef SECCOMP_SET_MODE_FILTER
#define SECCOMP_SET_MODE_FILTER 1
#endif
#ifndef SECCOMP_FILTER_FLAG_TSYNC
#define SECCOMP_FILTER_FLAG_TSYNC 1
#endif
#ifndef SECCOMP_RET_KILL_PROCESS
#define SECCOMP_RET_KILL_PROCESS 0x80000000u
#endif
#ifndef SECBIT_NO_CAP_AMBIENT_RAISE
#define SECBIT_NO_CAP_AMBIENT_RAISE (1 << 6)
#define SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED (1 << 7)
#endif
#endif

/* pye_os_status is the status of a system call that failed with `error`. */
static inline pye_status pye_os_status(int error)
{
    switch (error) {
    case EPERM:
    case EACCES:
        return PYE_E_DENIED;
    case ENOSYS:
        return PYE_E_UNSUPPORTED;
    case ENOMEM:
        return PYE_E_NO_MEMORY;
    default:
        return PYE_E_OS;
    }
}

/* pye_os_result turns the result of a system call (negative: failed) into a status. */
static inline pye_status pye_os_result(long result)
{
    return result < 0 ? pye_os_status(errno) : PYE_OK;
}

#endif
