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

#endif
