/* watch.c - a thread that watches futex words and tells an event loop by an eventfd. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#include <stdlib.h>

#if defined(__linux__)

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAITV_32 2    /* FUTEX_32 of linux/futex.h, which older headers lack */
#define WAITV_MAX 128 /* FUTEX_WAITV_MAX; one of them is for our own word */
#define SLICE_MS 100  /* a wake that was lost costs this much, no more */
#define PLAIN_MS 5    /* without futex_waitv a kick may come too early to be seen */
#define SHORT_MS 1    /* where not all words can be slept on at once */
#define STACK_SIZE 131072

struct waiter { /* struct futex_waitv */
    uint64_t val;
    uint64_t uaddr;
    uint32_t flags;
    uint32_t reserved;
};
_Static_assert(sizeof(struct waiter) == 24, "futex_waitv(2)");

struct pye_watch {
    pthread_mutex_t lock;
    pthread_t thread;
    uint32_t changes;   /* counts kicks; slept on too */
    uint32_t *sleeping; /* the word slept on where only one can be, under the lock */
    uint32_t num;
    uint32_t used; /* slots above are empty */
    int event_fd;
    int stop;
    int plain; /* the kernel has no futex_waitv, or a filter refuses it */
    struct {
        uint32_t *word;
        uint32_t expected;
    } slots[];
};

/* Sleep until a kick, or until one of the `count` words after the first moved on. */
static void sleep_on(pye_watch *watch, struct waiter *waiters, uint32_t count, uint32_t slice_ms,
                     uint32_t seen)
{
    pye_status rc;
    const int plain = __atomic_load_n(&watch->plain, __ATOMIC_RELAXED);

    if (!plain && count > 0) {
        struct timespec end;

        (void)clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_nsec += (long)slice_ms * 1000000;
        if (end.tv_nsec >= 1000000000) {
            end.tv_nsec -= 1000000000;
            end.tv_sec++;
        }
        /* Linux 5.16; a filter may refuse it. */
        if (syscall(PYE_NR_FUTEX_WAITV, waiters, count + 1, 0, &end, CLOCK_MONOTONIC) < 0 &&
            errno != EAGAIN && errno != EINTR && errno != ETIMEDOUT) {
            __atomic_store_n(&watch->plain, 1, __ATOMIC_RELAXED);
        }
        return;
    }
    if (count == 0) {
        rc = pye_wait_futex(&watch->changes, seen, SLICE_MS * 100);
    } else {
        rc = pye_wait_futex((uint32_t *)(uintptr_t)waiters[1].uaddr, (uint32_t)waiters[1].val,
                            count > 1 ? SHORT_MS : PLAIN_MS);
    }
    (void)rc; /* whatever ended it: the words are looked at */
}

static void *run(void *context)
{
    pye_watch *watch = context;
    struct waiter waiters[WAITV_MAX];

    pthread_mutex_lock(&watch->lock);
    while (!watch->stop) {
        const uint32_t seen = __atomic_load_n(&watch->changes, __ATOMIC_SEQ_CST);
        uint32_t count = 0;
        int fired = 0;
        int too_many = 0;

        for (uint32_t i = 0; i < watch->used; i++) {
            uint32_t *word = watch->slots[i].word;

            if (word == NULL) {
                continue;
            }
            if (__atomic_load_n(word, __ATOMIC_SEQ_CST) != watch->slots[i].expected) {
                watch->slots[i].word = NULL;
                fired = 1;
            } else if (count + 1 < WAITV_MAX) {
                count++;
                waiters[count] = (struct waiter){
                    .val = watch->slots[i].expected,
                    .uaddr = (uintptr_t)word,
                    .flags = WAITV_32, /* shared between processes */
                };
            } else {
                too_many = 1;
            }
        }
        waiters[0] = (struct waiter){
            .val = seen,
            .uaddr = (uintptr_t)&watch->changes,
            .flags = WAITV_32,
        };
        watch->sleeping = count > 0 ? (uint32_t *)(uintptr_t)waiters[1].uaddr : NULL;
        pthread_mutex_unlock(&watch->lock);
        if (fired) {
            const uint64_t one = 1;
            const ssize_t done = write(watch->event_fd, &one, sizeof(one));
            (void)done; /* full: then it is readable already */
        }
        sleep_on(watch, waiters, count, too_many ? SHORT_MS : SLICE_MS, seen);
        pthread_mutex_lock(&watch->lock);
    }
    pthread_mutex_unlock(&watch->lock);
    return NULL;
}

/* A thread with a small stack that takes no signal of the program's. */
static int start(pye_watch *watch)
{
    pthread_attr_t attributes;
    sigset_t all;
    sigset_t before;
    int error = pthread_attr_init(&attributes);

    if (error != 0) {
        return error;
    }
    error = pthread_attr_setstacksize(&attributes, STACK_SIZE);
    sigfillset(&all);
    if (error == 0) {
        error = pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    if (error == 0) {
        error = pthread_create(&watch->thread, &attributes, run, watch);
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    (void)pthread_attr_destroy(&attributes);
    return error;
}

pye_status pye_watch_new(pye_watch **out, uint32_t num, int event_fd)
{
    pye_status rc;
    pye_watch *watch = NULL;
    int error;

    *out = NULL;
    PYE_REQUIRE(num > 0 && num <= PYE_WATCH_MAX, PYE_E_ARGUMENT);
    watch = calloc(1, sizeof(*watch) + num * sizeof(watch->slots[0]));
    PYE_REQUIRE(watch != NULL, PYE_E_NO_MEMORY);
    watch->num = num;
    watch->event_fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 3);
    PYE_REQUIRE(watch->event_fd >= 0, PYE_E_OS);
    error = pthread_mutex_init(&watch->lock, NULL);
    if (error == 0) {
        error = start(watch);
        if (error != 0) {
            (void)pthread_mutex_destroy(&watch->lock);
        }
    }
    if (PYE_GUARD(error != 0)) {
        (void)close(watch->event_fd);
        errno = error;
        rc = PYE_E_OS;
        goto done;
    }
    *out = watch;
    return PYE_OK;
done:
    free(watch);
    return rc;
}

void pye_watch_set(pye_watch *watch, uint32_t slot, uint32_t *word, uint32_t expected)
{
    if (PYE_GUARD(slot >= watch->num)) {
        return;
    }
    pthread_mutex_lock(&watch->lock);
    watch->slots[slot].word = word;
    watch->slots[slot].expected = expected;
    if (slot >= watch->used) {
        watch->used = slot + 1;
    }
    pthread_mutex_unlock(&watch->lock);
}

void pye_watch_kick(pye_watch *watch)
{
    pye_status rc;
    uint32_t *sleeping;

    pthread_mutex_lock(&watch->lock);
    (void)__atomic_add_fetch(&watch->changes, 1, __ATOMIC_SEQ_CST);
    sleeping = __atomic_load_n(&watch->plain, __ATOMIC_RELAXED) ? watch->sleeping : NULL;
    pthread_mutex_unlock(&watch->lock);
    rc = pye_wake_futex(&watch->changes);
    (void)rc;
    if (sleeping != NULL) {
        rc = pye_wake_futex(sleeping);
        (void)rc;
    }
}

void pye_watch_free(pye_watch *watch)
{
    if (watch == NULL) {
        return;
    }
    pthread_mutex_lock(&watch->lock);
    watch->stop = 1;
    pthread_mutex_unlock(&watch->lock);
    pye_watch_kick(watch);
    (void)pthread_join(watch->thread, NULL);
    (void)pthread_mutex_destroy(&watch->lock);
    (void)close(watch->event_fd);
    free(watch);
}

#else

pye_status pye_watch_new(pye_watch **out, uint32_t num, int event_fd)
{
    (void)num;
    (void)event_fd;
    *out = NULL;
    return PYE_E_UNSUPPORTED;
}

void pye_watch_set(pye_watch *watch, uint32_t slot, uint32_t *word, uint32_t expected)
{
    (void)watch;
    (void)slot;
    (void)word;
    (void)expected;
}

void pye_watch_kick(pye_watch *watch)
{
    (void)watch;
}

void pye_watch_free(pye_watch *watch)
{
    (void)watch;
}

#endif
