/* pager_lock.h - the lock of a heap: usable in a signal handler, and not held when a signal comes.
 *
 * A futex word (Drepper, "Futexes are tricky", mutex 2): 0 free, 1 held, 2 held and awaited. */
#ifndef PYE_SRC_LINUX_PAGER_LOCK_H
#define PYE_SRC_LINUX_PAGER_LOCK_H

#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGER_SPINS 100

static inline void pager_lock(_Atomic uint32_t *lock)
{
    uint32_t seen = 0;

    if (atomic_compare_exchange_strong_explicit(lock, &seen, 1, memory_order_acquire,
                                                memory_order_relaxed)) {
        return;
    }
    for (int i = 0; i < PAGER_SPINS; i++) {
        seen = 0;
        if (atomic_load_explicit(lock, memory_order_relaxed) == 0 &&
            atomic_compare_exchange_strong_explicit(lock, &seen, 1, memory_order_acquire,
                                                    memory_order_relaxed)) {
            return;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    while (atomic_exchange_explicit(lock, 2, memory_order_acquire) != 0) {
        (void)syscall(SYS_futex, lock, FUTEX_WAIT_PRIVATE, 2, NULL, NULL, 0);
    }
}

static inline void pager_unlock(_Atomic uint32_t *lock)
{
    if (atomic_exchange_explicit(lock, 0, memory_order_release) == 2) {
        (void)syscall(SYS_futex, lock, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }
}

/* pager_block keeps every signal away, so that no handler of somebody else's touches the heap while
 * this thread holds its lock. */
static inline void pager_block(sigset_t *before)
{
    sigset_t all;

    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, before);
}

static inline void pager_unblock(const sigset_t *before)
{
    (void)pthread_sigmask(SIG_SETMASK, before, NULL);
}

#endif
