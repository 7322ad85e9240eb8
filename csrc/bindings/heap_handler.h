/* heap_handler.h - the process's handler of SIGBUS and SIGSEGV, and the table of heaps it serves.
 *
 * It is here and not in the core because there may be only one in a process, and the core is linked
 * into two modules. Only _core includes this file.
 *
 * The table is read by the handler in any thread while others change it: each entry has a counter
 * that is odd meanwhile. What is no heap's matter goes to the handler that was there before. */
#ifndef PYE_BINDINGS_HEAP_HANDLER_H
#define PYE_BINDINGS_HEAP_HANDLER_H

#include "pyenclave/heap.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>

#define HEAP_TABLE 64
#define HEAP_LAST_WORDS 1024

/* Why somebody found zeros in a heap. */
#define HEAP_NOTE_POISONED 1
#define HEAP_NOTE_CLOSED 2
#define HEAP_NOTE_FORKED 3

/* Called in the handler after zeros were shown to the thread: it must be async-signal-safe. */
typedef void (*heap_note_function)(pye_heap *heap, int reason);
static _Atomic(heap_note_function) heap_note;

#if defined(__linux__)

#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* What ends an enclave whose heap was changed: set once, by heap_end_with. */
static struct {
    _Atomic int armed;
    int fd;
    uint32_t len;
    uint8_t message[HEAP_LAST_WORDS];
} heap_end;

/* heap_end_with has the process send `message` on `fd`, and end, when a heap of it is found
 * poisoned: no code of it runs any more that could go on with zeros. */
static void heap_end_with(int fd, const uint8_t *message, uint32_t len)
{
    heap_end.fd = fd;
    heap_end.len = len;
    memcpy(heap_end.message, message, len);
    atomic_store_explicit(&heap_end.armed, 1, memory_order_release);
}

/* heap_end_if_armed is async-signal-safe. The heap has wiped itself; what other secrets there are
 * go with the process, whose secret pages the kernel clears. */
static void heap_end_if_armed(void)
{
    if (atomic_load_explicit(&heap_end.armed, memory_order_acquire)) {
        (void)send(heap_end.fd, heap_end.message, heap_end.len, MSG_NOSIGNAL | MSG_DONTWAIT);
        _exit(3);
    }
}

typedef struct {
    _Atomic uint32_t changes;
    _Atomic uintptr_t base;
    _Atomic uintptr_t size;
    _Atomic(pye_heap *) heap;
    int32_t fds[PYE_HEAP_FDS];
} heap_entry;

static heap_entry heap_table[HEAP_TABLE];
static atomic_flag heap_table_lock = ATOMIC_FLAG_INIT;

/* The handlers that were there before, of SIGBUS and SIGSEGV. `chained`: it has been asked about a
 * fault, and if the signal comes again by hand it was its way of asking the one before it. */
static struct {
    struct sigaction action;
    _Atomic int chained;
} heap_before[2];

static inline int heap_signal_index(int number)
{
    return number == SIGSEGV;
}

static void heap_table_enter(void)
{
    while (atomic_flag_test_and_set_explicit(&heap_table_lock, memory_order_acquire)) {
        (void)sched_yield();
    }
}

static void heap_table_leave(void)
{
    atomic_flag_clear_explicit(&heap_table_lock, memory_order_release);
}

static void heap_entry_set(heap_entry *entry, pye_heap *heap, uintptr_t base, uintptr_t size)
{
    (void)atomic_fetch_add_explicit(&entry->changes, 1, memory_order_seq_cst);
    atomic_store_explicit(&entry->base, base, memory_order_seq_cst);
    atomic_store_explicit(&entry->size, size, memory_order_seq_cst);
    atomic_store_explicit(&entry->heap, heap, memory_order_seq_cst);
    (void)atomic_fetch_add_explicit(&entry->changes, 1, memory_order_seq_cst);
}

/* heap_find returns the heap that `address` is of, or NULL. In a forked child a heap of its own may
 * lie where one of its parent's was, which is not there any more: the living one counts. */
static pye_heap *heap_find(uintptr_t address)
{
    pye_heap *gone = NULL;

    for (int i = 0; i < HEAP_TABLE; i++) {
        heap_entry *const entry = &heap_table[i];
        uint32_t changes;
        uintptr_t base;
        uintptr_t size;
        pye_heap *heap;

        do {
            changes = atomic_load_explicit(&entry->changes, memory_order_acquire);
            base = atomic_load_explicit(&entry->base, memory_order_relaxed);
            size = atomic_load_explicit(&entry->size, memory_order_relaxed);
            heap = atomic_load_explicit(&entry->heap, memory_order_relaxed);
            atomic_thread_fence(memory_order_acquire);
        } while ((changes & 1) != 0 ||
                 atomic_load_explicit(&entry->changes, memory_order_relaxed) != changes);
        if (address - base < size) {
            if (pye_heap_live(heap)) {
                return heap;
            }
            gone = heap;
        }
    }
    return gone;
}

/* heap_access says what kind of access the fault in `context` was, as far as the CPU tells. */
static uint32_t heap_access(const siginfo_t *info, const void *context)
{
    uint32_t flags = 0;

    if (info->si_signo == SIGSEGV) {
        flags |= PYE_FAULT_SEGMENT;
        flags |= info->si_code == SEGV_MAPERR ? PYE_FAULT_UNMAPPED : 0;
        flags |= info->si_code == 4 /* SEGV_PKUERR */ ? PYE_FAULT_FOREIGN : 0;
    } else if (info->si_code == BUS_MCEERR_AR || info->si_code == BUS_MCEERR_AO) {
        flags |= PYE_FAULT_FOREIGN;
    }
#if defined(__x86_64__)
    /* The error code of the page fault: Intel SDM vol. 3A, 4.7. */
    const greg_t code = ((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR];

    flags |= (code & 2) ? PYE_FAULT_WRITE : 0;
    flags |= (code & 16) ? PYE_FAULT_EXECUTE : 0;
#elif defined(__aarch64__)
    /* The syndrome is in a record of its own behind the registers: Linux, asm/sigcontext.h. */
    const uint8_t *at = (const uint8_t *)((const ucontext_t *)context)->uc_mcontext.__reserved;
    const uint8_t *const end = at + 4096 - 16;

    while (at < end) {
        const uint32_t magic = ((const uint32_t *)(const void *)at)[0];
        const uint32_t size = ((const uint32_t *)(const void *)at)[1];

        if (magic == 0 || size < 8) {
            break;
        }
        if (magic == 0x45535201) {
            const uint64_t syndrome = ((const uint64_t *)(const void *)at)[1];
            const uint32_t kind = (uint32_t)(syndrome >> 26) & 0x3f;

            flags |= (kind == 0x24 && (syndrome & 0x40)) ? PYE_FAULT_WRITE : 0;
            flags |= kind == 0x20 ? PYE_FAULT_EXECUTE : 0;
            break;
        }
        at += size;
    }
#else
    (void)context;
#endif
    return flags;
}

/* heap_default lets the signal do what it does without a handler: end the process. */
static void heap_default(int number, siginfo_t *info)
{
    struct sigaction action = {.sa_handler = SIG_DFL};

    (void)sigaction(number, &action, NULL);
    if (info->si_code <= 0) { /* sent, so the instruction will not fault again */
        (void)syscall(SYS_rt_tgsigqueueinfo, (long)getpid(), syscall(SYS_gettid), number, info);
    }
}

static void heap_chain(int number, siginfo_t *info, void *context)
{
    const struct sigaction *const before = &heap_before[heap_signal_index(number)].action;
    _Atomic int *const chained = &heap_before[heap_signal_index(number)].chained;
    const int simple = !(before->sa_flags & SA_SIGINFO);
    sigset_t waiting;

    if (simple && before->sa_handler == SIG_IGN && info->si_code <= 0) {
        return;
    }
    if ((simple && (before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN)) ||
        (info->si_code <= 0 && atomic_load(chained))) {
        heap_default(number, info);
        return;
    }
    atomic_store(chained, info->si_code > 0);
    if (simple) {
        before->sa_handler(number);
    } else {
        before->sa_sigaction(number, info, context);
    }
    /* Signals wait while this runs: one that was raised meanwhile asks for what was there before
     * (faulthandler does so). That is this handler, if faulthandler came later. */
    if (sigpending(&waiting) == 0 && sigismember(&waiting, number) == 1) {
        heap_default(number, info);
    }
}

static void heap_on_signal(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    pye_heap *heap = NULL;
    int reason = 0;

    if (info->si_code > 0) {
        heap = heap_find((uintptr_t)info->si_addr);
    }
    if (heap != NULL) {
        switch (pye_heap_fault(heap, (uintptr_t)info->si_addr, heap_access(info, context))) {
        case PYE_OK:
            break;
        case PYE_E_POISONED:
            heap_end_if_armed();
            reason = HEAP_NOTE_POISONED;
            break;
        case PYE_E_CLOSED:
            reason = HEAP_NOTE_CLOSED;
            break;
        case PYE_E_FORKED:
            reason = HEAP_NOTE_FORKED;
            break;
        default:
            heap = NULL;
            break;
        }
    }
    if (heap == NULL) {
        heap_chain(number, info, context);
    } else if (reason != 0) {
        const heap_note_function note = atomic_load_explicit(&heap_note, memory_order_acquire);

        if (note != NULL) {
            note(heap, reason);
        }
    }
    errno = saved;
}

/* heap_after_fork closes in a child what it has inherited of the heaps. */
static void heap_after_fork(void)
{
    for (int i = 0; i < HEAP_TABLE; i++) {
        heap_entry *const entry = &heap_table[i];
        /* Another thread was changing it, and is not here to end that: the handler would wait. */
        const int torn = (int)(atomic_load_explicit(&entry->changes, memory_order_relaxed) & 1);

        if (torn || atomic_load_explicit(&entry->heap, memory_order_relaxed) != NULL) {
            pye_heap_child(entry->fds);
            for (int k = 0; k < PYE_HEAP_FDS; k++) {
                entry->fds[k] = -1;
            }
        }
        if (torn) {
            atomic_store(&entry->heap, NULL);
            atomic_store(&entry->size, 0);
            (void)atomic_fetch_add(&entry->changes, 1);
        }
    }
    atomic_flag_clear(&heap_table_lock);
}

/* heap_handlers puts the handler in place where it is not (somebody may have put his own there
 * since), and keeps what it finds. Returns a status. */
static pye_status heap_handlers(void)
{
    static const int numbers[2] = {SIGBUS, SIGSEGV};
    static int forks = 0;
    pye_status rc = PYE_OK;

    heap_table_enter();
    if (!forks) {
        forks = pthread_atfork(NULL, NULL, heap_after_fork) == 0;
        rc = forks ? PYE_OK : PYE_E_NO_MEMORY;
    }
    for (int i = 0; i < 2 && rc == PYE_OK; i++) {
        struct sigaction ours = {.sa_sigaction = heap_on_signal, .sa_flags = SA_SIGINFO};
        struct sigaction there;

        if (sigaction(numbers[i], NULL, &there) != 0) {
            rc = PYE_E_OS;
        } else if (!(there.sa_flags & SA_SIGINFO) || there.sa_sigaction != heap_on_signal) {
            heap_before[i].action = there;
            atomic_store(&heap_before[i].chained, 0);
            (void)sigfillset(&ours.sa_mask);
            rc = sigaction(numbers[i], &ours, NULL) == 0 ? PYE_OK : PYE_E_OS;
        }
    }
    heap_table_leave();
    return rc;
}

/* heap_table_add has the handler serve a heap. PYE_E_LIMIT: there are HEAP_TABLE already. */
static pye_status heap_table_add(pye_heap *heap, uintptr_t size)
{
    pye_status rc = PYE_E_LIMIT;

    heap_table_enter();
    for (int i = 0; i < HEAP_TABLE; i++) {
        if (atomic_load_explicit(&heap_table[i].heap, memory_order_relaxed) == NULL) {
            pye_heap_descriptors(heap, heap_table[i].fds);
            heap_entry_set(&heap_table[i], heap, (uintptr_t)pye_heap_base(heap), size);
            rc = PYE_OK;
            break;
        }
    }
    heap_table_leave();
    return rc;
}

static void heap_table_remove(const pye_heap *heap)
{
    heap_table_enter();
    for (int i = 0; i < HEAP_TABLE; i++) {
        if (atomic_load_explicit(&heap_table[i].heap, memory_order_relaxed) == heap) {
            heap_entry_set(&heap_table[i], NULL, 0, 0);
        }
    }
    heap_table_leave();
}

#else

static void heap_end_with(int fd, const uint8_t *message, uint32_t len)
{
    (void)fd;
    (void)message;
    (void)len;
}

static void heap_end_if_armed(void)
{
}

static pye_status heap_handlers(void)
{
    return PYE_E_UNSUPPORTED;
}

static pye_status heap_table_add(pye_heap *heap, uintptr_t size)
{
    (void)heap;
    (void)size;
    return PYE_E_UNSUPPORTED;
}

static void heap_table_remove(const pye_heap *heap)
{
    (void)heap;
}

#endif
#endif
