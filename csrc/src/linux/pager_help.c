/* pager_help.c - a second thread, which its user lends a heap: it opens half of what comes.
 *
 * Who has the heap's lock and many pages to open offers the second half, does the first, and
 * collects; what nobody took until then it does itself. The lock is held as ever, so that the
 * helper needs none: nobody changes what it works on before it was collected. It has all signals
 * blocked and never touches the view, so it never waits for the heap. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "linux/pager_lock.h"

#include <limits.h>
#include <time.h>

/* NOBODY → IDLE when it is hired; a helper that has nothing to do goes to sleep, and leaves from
 * IDLE. OFFERED → TAKEN → DONE, or back to IDLE; AWAITED is TAKEN, and who collects sleeps. */
enum { NOBODY, IDLE, ASLEEP, OFFERED, TAKEN, AWAITED, DONE };

/* How often a helper looks for work before it sleeps: some tenth of a millisecond, more than there is
 * between two steps of a sequence. Who collects looks as often. */
#define LOOKS 8192

static int move(_Atomic uint32_t *state, uint32_t from, uint32_t to)
{
    return atomic_compare_exchange_strong(state, &from, to);
}

static void sleep_on(_Atomic uint32_t *state, uint32_t seen, const struct timespec *most)
{
    (void)syscall(SYS_futex, state, FUTEX_WAIT_PRIVATE, seen, most, NULL, 0);
}

/* wake wakes all: who hired may be in pye_heap_help beside the thread that he hired for it. */
static void wake(_Atomic uint32_t *state)
{
    (void)syscall(SYS_futex, state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static inline void pause_a_little(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* changed waits for another state than `seen`, for a while. */
static int changed(_Atomic uint32_t *state, uint32_t seen)
{
    for (int i = 0; i < LOOKS; i++) {
        if (atomic_load_explicit(state, memory_order_acquire) != seen) {
            return 1;
        }
        pause_a_little();
    }
    return 0;
}

static pye_status do_part(pye_heap *heap)
{
    const pager_part *const part = &heap->help.part;

    return part->work(heap, part);
}

int pager_offer(pye_heap *heap, const pager_part *part)
{
    _Atomic uint32_t *const state = &heap->help.state;
    const uint32_t seen = atomic_load_explicit(state, memory_order_relaxed);

    if (seen == NOBODY) {
        return 0;
    }
    heap->help.part = *part;
    /* Between IDLE and ASLEEP it goes by itself, and away when it was dismissed. */
    if (move(state, IDLE, OFFERED)) {
        return 1;
    }
    if (move(state, ASLEEP, OFFERED)) {
        wake(state);
        return 1;
    }
    return 0;
}

pye_status pager_collect(pye_heap *heap)
{
    _Atomic uint32_t *const state = &heap->help.state;

    if (move(state, OFFERED, IDLE)) {
        return do_part(heap);
    }
    if (!changed(state, TAKEN) && move(state, TAKEN, AWAITED)) {
        while (atomic_load(state) == AWAITED) {
            sleep_on(state, AWAITED, NULL);
        }
    }
    const pye_status rc = heap->help.status;
    heap->stats.helped += heap->help.part.num;
    if (rc != PYE_OK) {
        errno = heap->help.error;
    }
    atomic_store(state, IDLE);
    return rc;
}

pye_status pye_heap_hire(pye_heap *heap)
{
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    PYE_REFUSE_IF(atomic_exchange(&heap->help.hired, 1) != 0, PYE_E_BUSY);
    atomic_store(&heap->help.leave, 0);
    atomic_store(&heap->help.state, IDLE);
    return PYE_OK;
}

void pye_heap_dismiss(pye_heap *heap)
{
    if (!pye_heap_live(heap)) {
        return;
    }
    atomic_store(&heap->help.leave, 1);
    if (move(&heap->help.state, ASLEEP, IDLE)) {
        wake(&heap->help.state);
    }
}

/* rest sleeps until there is work, unless it may leave. */
static void rest(pye_heap *heap)
{
    _Atomic uint32_t *const state = &heap->help.state;

    if (!move(state, IDLE, ASLEEP)) {
        return;
    }
    /* Who dismisses has seen ASLEEP, or `leave` is seen here. */
    while (!atomic_load(&heap->help.leave) && atomic_load(state) == ASLEEP) {
        sleep_on(state, ASLEEP, NULL);
    }
    (void)move(state, ASLEEP, IDLE);
}

static void take(pye_heap *heap)
{
    heap->help.status = do_part(heap);
    heap->help.error = errno;
    if (atomic_exchange(&heap->help.state, DONE) == AWAITED) {
        wake(&heap->help.state);
    }
}

void pye_heap_help(pye_heap *heap)
{
    static const struct timespec soon = {0, 1000000};
    sigset_t before;

    if (!pye_heap_live(heap)) {
        return;
    }
    pager_block(&before);
    for (;;) {
        _Atomic uint32_t *const state = &heap->help.state;
        const uint32_t seen = atomic_load(state);

        if (seen == NOBODY) {
            break; /* without pye_heap_hire */
        }
        if (seen == OFFERED) {
            if (move(state, OFFERED, TAKEN)) {
                take(heap);
            }
        } else if (seen == IDLE && atomic_load(&heap->help.leave)) {
            if (move(state, IDLE, NOBODY)) {
                atomic_store(&heap->help.hired, 0);
                break;
            }
        } else if (!changed(state, seen)) {
            if (seen == IDLE) {
                rest(heap);
            } else {
                sleep_on(state, seen, &soon); /* DONE: who collects was interrupted */
            }
        }
    }
    pager_unblock(&before);
}

#else
typedef int pye_pager_help_is_for_linux; /* ISO C wants a declaration */
#endif
