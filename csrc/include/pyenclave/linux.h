/* linux.h - secret memory, waiting, and what closes a process in. Only src/linux makes system
 * calls. On a system that lacks a mechanism its function returns PYE_E_UNSUPPORTED; a refusal is
 * PYE_E_DENIED; in both cases and after PYE_E_OS, errno is that of the call. */
#ifndef PYENCLAVE_LINUX_H
#define PYENCLAVE_LINUX_H

#include "pyenclave/base.h"

/* ---- secret memory (secmem.c) ---- */

/* Kinds of secret memory, best first. */
/* memfd_secret: not in the kernel's direct map, not readable from outside, not in dumps or swap. */
#define PYE_SECMEM_SECRET 1
/* Anonymous, locked (not in swap), not in dumps of this process. */
#define PYE_SECMEM_LOCKED 2
/* As LOCKED, but the lock was refused (RLIMIT_MEMLOCK): it may reach swap. */
#define PYE_SECMEM_UNLOCKED 3

/* pye_secmem_new maps `size` zero bytes (1 to 2^46) for secrets, page-aligned, with an unreadable
 * guard page on each side, and writes the address to `out` and which kind it became to `kind`. A
 * forked child does not get the pages: touching them there is SIGSEGV. The descriptor is closed
 * before the function returns. Pages are taken on first touch (SECRET) or at once (LOCKED).
 * Thread-safe. Failure: PYE_E_LENGTH, PYE_E_NO_MEMORY, PYE_E_OS; then `out` is NULL, `kind` 0. */
PYE_MUST_USE pye_status pye_secmem_new(void **out, size_t size, uint32_t *kind);
/* pye_secmem_free wipes and unmaps memory of pye_secmem_new, guards included; `size` must be the
 * size asked for. NULL is nothing to do. In a forked child, where the pages are not, it only
 * drops the guards. errno is kept. */
void pye_secmem_free(void *memory, size_t size);
/* pye_secmem_live returns 1 in the process that called pye_secmem_new for `memory`, 0 in a forked
 * child. One load, no system call: cheap enough for each use of a key. */
int pye_secmem_live(const void *memory);
/* pye_secmem_limit reads RLIMIT_MEMLOCK in bytes; UINT64_MAX means without limit. Memory for which
 * the lock succeeds is bounded by it, for whoever lacks CAP_IPC_LOCK. */
PYE_MUST_USE pye_status pye_secmem_limit(uint64_t *out_soft, uint64_t *out_hard);

/* ---- waiting (wait.c) ---- */

/* pye_wait_futex sleeps while `*word` is `expected`, for at most `timeout_ms`, until a wake. The
 * word may be in memory shared between processes (not in secret memory: EFAULT). PYE_OK: woken,
 * the value differed, or a signal came; look at the word again. PYE_E_TIMEOUT: the time passed. */
PYE_MUST_USE pye_status pye_wait_futex(uint32_t *word, uint32_t expected, uint32_t timeout_ms);
/* pye_wake_futex wakes every thread, of any process, that waits on `word`. */
PYE_MUST_USE pye_status pye_wake_futex(uint32_t *word);
/* pye_wait_yield gives the processor to another runnable thread. */
void pye_wait_yield(void);
/* pye_clock_ns returns nanoseconds of the monotonic clock, or 0 where there is none. */
uint64_t pye_clock_ns(void);

/* ---- watching words for an event loop (watch.c) ---- */

#define PYE_WATCH_MAX 1024

typedef struct pye_watch pye_watch;

/* pye_watch_new starts a thread that watches up to `num` (at most PYE_WATCH_MAX) words of memory
 * and writes to `event_fd` (an eventfd, which it duplicates) when one changed. The thread blocks
 * all signals and runs nothing but this. PYE_E_NO_MEMORY, PYE_E_OS: nothing was started. */
PYE_MUST_USE pye_status pye_watch_new(pye_watch **out, uint32_t num, int event_fd);
/* pye_watch_set has slot `slot` wait until `*word`, which must stay mapped, is no longer
 * `expected`; then the event is written once and the slot is empty. NULL empties it. What several
 * calls set takes effect by pye_watch_kick at the latest. Slots out of range are ignored. */
void pye_watch_set(pye_watch *watch, uint32_t slot, uint32_t *word, uint32_t expected);
void pye_watch_kick(pye_watch *watch);
/* pye_watch_free ends the thread and waits for that. NULL is nothing to do. Not in a forked child,
 * which has no such thread. */
void pye_watch_free(pye_watch *watch);

/* ---- descriptors and other processes (fds.c, process.c) ---- */

/* Seals that a memfd can carry (fcntl F_ADD_SEALS), with the kernel's values. */
#define PYE_SEAL_SEAL 1
#define PYE_SEAL_SHRINK 2
#define PYE_SEAL_GROW 4
#define PYE_SEAL_WRITE 8
#define PYE_SEAL_FUTURE_WRITE 16

/* pye_fd_check_memfd accepts `fd` only if it is a memfd that carries every seal of `seals` (which
 * must contain SHRINK: without it a peer can make any reader die of SIGBUS) and whose size is
 * `size`, or anything above 0 if `size` is 0. Its size goes to `out_size`. A pipe, socket, plain
 * file or unsealed memfd is PYE_E_DENIED, another size PYE_E_LENGTH, a bad descriptor PYE_E_OS. */
PYE_MUST_USE pye_status pye_fd_check_memfd(int fd, uint64_t size, uint32_t seals,
                                           uint64_t *out_size);
/* pye_fds_close_except closes every descriptor but the `num_keep` (at most 256) at `keep`, in any
 * order, doubles and negative ones allowed. PYE_E_UNSUPPORTED without close_range (Linux 5.9). */
PYE_MUST_USE pye_status pye_fds_close_except(const int *keep, size_t num_keep);

/* pye_pidfd_open writes a close-on-exec descriptor of process `pid` to `out_fd` (else -1). */
PYE_MUST_USE pye_status pye_pidfd_open(int *out_fd, int64_t pid);
/* pye_pidfd_wait returns PYE_OK once the process has ended (reaped or not), PYE_E_TIMEOUT after
 * `timeout_ms`, PYE_E_BUSY when a signal came first. */
PYE_MUST_USE pye_status pye_pidfd_wait(int pidfd, uint32_t timeout_ms);
/* pye_pidfd_kill sends `signal` to the process of `pidfd`; signal 0 only checks. */
PYE_MUST_USE pye_status pye_pidfd_kill(int pidfd, int signal);
/* pye_pidfd_steal takes a duplicate of descriptor `target` out of another process: what an
 * attacker tries. PYE_E_DENIED is the answer of a process that is closed in. */
PYE_MUST_USE pye_status pye_pidfd_steal(int *out_fd, int pidfd, int target);
/* pye_process_read reads up to `len` bytes at `address` of process `pid` (process_vm_readv), with
 * the count in `out_len`. For probes and attack tests. PYE_E_DENIED: the process may not be read;
 * PYE_E_OS with EFAULT: it may, but there is nothing readable at the address. */
PYE_MUST_USE pye_status pye_process_read(int64_t pid, uint64_t address, uint8_t *out, size_t len,
                                         size_t *out_len);

/* ---- hardening one process (harden.c) ---- */

/* pye_harden_dumpable_off: no reading, tracing or core dump by the same user's processes. Undone
 * by execve. */
PYE_MUST_USE pye_status pye_harden_dumpable_off(void);
/* pye_harden_core_limit sets the core file limit to 0, soft and hard. */
PYE_MUST_USE pye_status pye_harden_core_limit(void);
/* pye_harden_no_new_privs: no execve gains rights, for ever. */
PYE_MUST_USE pye_status pye_harden_no_new_privs(void);
/* pye_harden_parent_death has the kernel send `signal` when the creating thread ends.
 * `parent_pidfd` (or -1) is a pidfd of the parent: if that has ended already, the signal would
 * never come, and the result is PYE_E_PEER_LOST. */
PYE_MUST_USE pye_status pye_harden_parent_death(int signal, int parent_pidfd);
/* pye_harden_mdwe: from now on no memory becomes executable that was writable (Linux 6.3). */
PYE_MUST_USE pye_status pye_harden_mdwe(void);
/* pye_harden_signals sets every disposition to the default, SIGPIPE, SIGXFSZ and SIGINT to
 * ignored (a worker must not die of its owner's terminal or of a file limit), and unblocks all
 * signals. A fork inherits whatever odd state its parent had. */
PYE_MUST_USE pye_status pye_harden_signals(void);
/* pye_harden_capabilities empties the bounding and ambient sets and every capability set, and
 * locks securebits so that uid 0 is an ordinary user from now on; the uid stays. Where only some
 * steps are permitted (no CAP_SETPCAP) the sets must still end up empty. */
PYE_MUST_USE pye_status pye_harden_capabilities(void);
/* pye_harden_limit sets resource limit `resource` (RLIMIT_*) to `value`, soft and hard. */
PYE_MUST_USE pye_status pye_harden_limit(int resource, uint64_t value);
/* pye_harden_tracer reads who traces this process: 0 nobody, else its pid (or 1 if it is outside
 * this pid namespace). PYE_E_UNSUPPORTED without /proc. */
PYE_MUST_USE pye_status pye_harden_tracer(int64_t *out_pid);
/* pye_harden_threads counts the threads of this process. PYE_E_UNSUPPORTED without /proc. */
PYE_MUST_USE pye_status pye_harden_threads(uint32_t *out_count);

/* ---- landlock and seccomp (landlock.c, seccomp.c) ---- */

/* pye_sandbox_landlock forbids this thread, and those it makes, every file access, TCP bind and
 * connect, and signals and abstract sockets to the outside, as far as the kernel's ABI knows them
 * (needs no_new_privs). Open descriptors stay usable. The ABI used goes to `out_abi` (0: none). */
PYE_MUST_USE pye_status pye_sandbox_landlock(uint32_t *out_abi);

/* Lets memory become executable, for code that compiles at run time. */
#define PYE_SECCOMP_JIT 1
/* Lets the pager of sealed memory work (heap.h): memory files, userfaultfd for faults of this
 * process's own code, and advice about this process's own memory. */
#define PYE_SECCOMP_SEALED 2
/* pye_sandbox_seccomp puts all threads under an allow-list of system calls (what Python and numpy
 * need on open descriptors). Everything else, calls of the future included, fails with EPERM;
 * calls of another architecture, x32 included, kill the process. For ever. */
PYE_MUST_USE pye_status pye_sandbox_seccomp(uint32_t flags);
/* pye_sandbox_seccomp_loading is for the time while an image's code is loaded, after Landlock: what
 * Landlock does not know (modes and owners of files, sockets with a path, becoming another program)
 * fails with EPERM; calls of another architecture kill the process. All threads, for ever. */
PYE_MUST_USE pye_status pye_sandbox_seccomp_loading(void);
/* pye_seccomp_deny makes the `num_calls` (at most 200) numbered system calls fail with
 * `error_number` in this process. Tests use it to become a kernel without some mechanism. */
PYE_MUST_USE pye_status pye_seccomp_deny(const int *calls, size_t num_calls, int error_number);

/* ---- spawning a worker (spawn.c) ---- */

#define PYE_NS_USER 1
#define PYE_NS_NET 2
#define PYE_NS_PID 4
#define PYE_NS_MOUNT 8
#define PYE_NS_IPC 16
#define PYE_NS_UTS 32
#define PYE_NS_CGROUP 64
#define PYE_NS_ALL 127
#define PYE_NUM_NS 7

/* How the child was made: one clone with everything; fork, unshare, fork; or a plain fork. */
#define PYE_SPAWN_CLONE 1
#define PYE_SPAWN_DOUBLE_FORK 2
#define PYE_SPAWN_FORK 3
/* Flags of pye_spawn_worker, for tests: do without the better ways. */
#define PYE_SPAWN_NO_CLONE 1
#define PYE_SPAWN_NO_TID_PRCTL 2

typedef struct {
    int64_t pid;                   /* the child's, as its maker sees it; 0 in the child */
    int32_t pidfd;                 /* the caller's to close; -1 in the child */
    uint32_t namespaces;           /* PYE_NS_* that are new in the child */
    uint32_t way;                  /* PYE_SPAWN_CLONE, ... */
    uint32_t reserved;             /* 0 */
    int64_t outer_pid;             /* the maker's pid in its own namespace */
    uint64_t outer_ns[PYE_NUM_NS]; /* inode numbers of the maker's namespaces, 0: unknown */
} pye_spawned;

/* pye_spawn_worker makes a child process in as many of `namespaces` as the kernel permits (all,
 * else all but the user namespace, else none) and returns in both processes, as fork does. In the
 * child, parent death is SIGKILL. The C library's idea of its thread id is right in the child;
 * handlers of pthread_atfork do not run with PYE_SPAWN_CLONE. PYE_E_STATE if this process has
 * more than one thread. With PYE_SPAWN_DOUBLE_FORK this process becomes a child subreaper. */
PYE_MUST_USE pye_status pye_spawn_worker(pye_spawned *out, uint32_t namespaces, uint32_t flags);

/* ---- what holds, tried from inside (probe.c) ---- */

#define PYE_BIT_DUMPABLE_OFF 0x1
#define PYE_BIT_UNTRACED 0x2
#define PYE_BIT_USERNS 0x4
#define PYE_BIT_NETNS 0x8
#define PYE_BIT_PIDNS 0x10
#define PYE_BIT_LANDLOCK 0x20
#define PYE_BIT_SECCOMP 0x40
#define PYE_BIT_MDWE 0x80
#define PYE_BIT_SECRETMEM 0x100
#define PYE_BIT_LOCKED 0x200
#define PYE_BIT_NODUMP 0x400
#define PYE_BIT_NO_NEW_PRIVS 0x800
#define PYE_BIT_NO_CAPABILITIES 0x1000
#define PYE_BIT_MOUNTNS 0x2000
#define PYE_BIT_IPCNS 0x4000
#define PYE_BIT_UTSNS 0x8000
#define PYE_BIT_CGROUPNS 0x10000

/* State of closing, owned by the caller and carried through the three steps. */
typedef struct {
    int64_t outer_pid;             /* from pye_spawned; 0: not known, pidns stays unproven */
    uint64_t outer_ns[PYE_NUM_NS]; /* from pye_spawned; 0: not known, that bit stays unproven */
    uint32_t landlock_abi;         /* out of step 1 */
    uint32_t secret_kind;          /* out of step 1: PYE_SECMEM_* that this process gets */
    uint32_t proved;               /* PYE_BIT_*, out of each step: tries that were refused */
    uint32_t step;                 /* 0, 1 after `before`, 2 after `after` */
} pye_sandbox;

/* pye_sandbox_before is step 1, while the process has one thread (else PYE_E_STATE): tries what
 * namespaces, capabilities and secret memory refuse, then sets no_new_privs and Landlock and tries
 * those, and last the filter for loading. From here on the image's code may run. A mechanism that
 * the kernel lacks is no failure: its bit stays 0. */
PYE_MUST_USE pye_status pye_sandbox_before(pye_sandbox *sandbox);
/* pye_sandbox_after is step 2, once all threads exist: MDWE (unless PYE_SECCOMP_JIT) and seccomp
 * on all threads. Secret memory can still be made afterwards; nothing can be opened. */
PYE_MUST_USE pye_status pye_sandbox_after(pye_sandbox *sandbox, uint32_t flags);
/* pye_sandbox_probe is step 3, callable at any time after: tries everything again that can still
 * be tried, and writes to `out_bits` those bits that were proved before and hold now. */
PYE_MUST_USE pye_status pye_sandbox_probe(pye_sandbox *sandbox, uint32_t *out_bits);
/* pye_bit_name returns the name of one PYE_BIT_* as evidence shows it ("netns"), or NULL. */
const char *pye_bit_name(uint32_t bit);

#endif
