/* wait.c - sleeping on a word of shared memory, and waking who sleeps there. */
#define _GNU_SOURCE
#include "linux/sys.h"
#include "pyenclave/linux.h"

#include <time.h>

#if defined(__linux__)

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

pye_status pye_wait_futex(uint32_t *word, uint32_t expected, uint32_t timeout_ms)
{
    const struct timespec timeout = {
        .tv_sec = (time_t)(timeout_ms / 1000),
        .tv_nsec = (long)(timeout_ms % 1000) * 1000000,
    };

    /* Not FUTEX_PRIVATE: the other end is another process. */
    if (syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, NULL, 0) == 0) {
        return PYE_OK;
    }
    switch (errno) {
    case EAGAIN: /* the word had changed already */
    case EINTR:
        return PYE_OK;
    case ETIMEDOUT:
        return PYE_E_TIMEOUT;
    default:
        return pye_os_status(errno);
    }
}

pye_status pye_wake_futex(uint32_t *word)
{
    return pye_os_result(syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0));
}

void pye_wait_yield(void)
{
    (void)sched_yield();
}

#else

pye_status pye_wait_futex(uint32_t *word, uint32_t expected, uint32_t timeout_ms)
{
    (void)word;
    (void)expected;
    (void)timeout_ms;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_wake_futex(uint32_t *word)
{
    (void)word;
    return PYE_E_UNSUPPORTED;
}

void pye_wait_yield(void)
{
}

#endif

uint64_t pye_clock_ns(void)
{
    struct timespec now;

    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
        return 0;
    }
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
