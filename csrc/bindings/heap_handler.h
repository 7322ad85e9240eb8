/* heap_handler.h - the process's handler of SIGBUS and SIGSEGV, and the table of heaps it serves; and
 * of SIGTRAP, by which zeros of a heap that has ended are shown for one instruction only.
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

/* Called in the handler before zeros are shown to the thread: it must be async-signal-safe. It returns
 * whether no other thread of Python code can begin to read meanwhile. */
typedef int (*heap_note_function)(pye_heap *heap, int reason);
static _Atomic(heap_note_function) heap_note;
/* Called in the handler when a page of zeros stays shown, so that somebody hides it soon. */
static _Atomic(void (*)(void)) heap_stays;

static void heap_stays_shown(void)
{
    void (*const tell)(void) = atomic_load_explicit(&heap_stays, memory_order_acquire);

    if (tell != NULL) {
        tell();
    }
}

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

/* The handlers that were there before, of SIGBUS, SIGSEGV and SIGTRAP. `chained`: it has been asked about a
 * fault, and if the signal comes again by hand it was its way of asking the one before it. */
static struct {
    struct sigaction action;
    _Atomic int chained;
} heap_before[3];

static inline int heap_signal_index(int number)
{
    return number == SIGSEGV ? 1 : number == SIGTRAP ? 2 : 0;
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
    if (info->si_code <= 0 || number == SIGTRAP) { /* sent, or a trap: it does not come again */
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

/* Zeros for one instruction. Whoever touches an ended heap is shown a page of zeros, so that its
 * instruction can end; memory is one for all threads, and others would read on in that page without
 * being told. So the thread is given the trap flag, with which the CPU raises SIGTRAP after one
 * instruction (Intel SDM vol. 3B, Single-Step Exception Condition), and the page is hidden then.
 *
 * A loop over a large array would take a thousand times as long. After HEAP_STEPS instructions pages
 * stay, one for each array that the loop goes through, until somebody conceals them. So they do at once
 * in a thread without the GIL: others begin to read while it is at a page, which is for a shorter time
 * if it is not stepped there, and find those closed that it has left.
 *
 * Where the trap would not come to this handler nothing is stepped, and pages stay: pager_end.c. */
#ifndef HEAP_STEPS
#define HEAP_STEPS 20000
#endif
#define HEAP_STEP_HEAPS 4
#define HEAP_STEP_ASK 256

#if defined(__x86_64__) && defined(__LP64__)

#include <fcntl.h>

#define HEAP_TRAP_FLAG 0x100 /* EFLAGS.TF */

/* Of this thread. */
static __thread struct {
    uintptr_t heaps[HEAP_STEP_HEAPS]; /* an address in each that the instruction touches */
    uint32_t num;
    uint32_t used;  /* instructions since the thread was told */
    uint32_t asked; /* times that it could be stepped, since then */
    greg_t at;      /* the instruction */
    uint8_t runs;   /* it has the flag, and is to trap */
    uint8_t theirs; /* it had the flag before: somebody steps through it by himself */
    uint8_t lost;   /* one was left with the flag, by another signal's handler: it may come back */
    uint8_t traced;
    uint8_t alone; /* nobody begins to read meanwhile */
} heap_step __attribute__((tls_model("initial-exec")));

/* heap_step_again lets the thread be stepped as long as ever: it has been told. */
static void heap_step_again(void)
{
    heap_step.used = heap_step.asked = 0;
}

/* heap_traced tells whether a tracer has this thread: debuggers keep SIGTRAP to themselves, and the
 * flag would never go. 1 if nobody knows. */
static uint8_t heap_traced(void)
{
    static const char name[] = "\nTracerPid:\t";
    char text[512]; /* it is within the first 200 */
    /* By number: read() and the like are points at which a thread may be cancelled. */
    const long fd = syscall(SYS_openat, AT_FDCWD, "/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
    const long size = fd < 0 ? -1 : syscall(SYS_read, fd, text, sizeof(text) - 1);

    if (fd >= 0) {
        (void)syscall(SYS_close, fd);
    }
    if (size <= 0) {
        return 1;
    }
    text[size] = 0;
    const char *const found = strstr(text, name);
    return found == NULL || found[sizeof(name) - 1] != '0';
}

static void heap_on_signal(int number, siginfo_t *info, void *context);

/* heap_can_step tells whether a trap of this thread would come to our handler, and nowhere else. */
static int heap_can_step(const ucontext_t *context)
{
    struct sigaction there;

    /* Blocked, it would end the process. An enclave ends anyhow, and its filter knows no open(). */
    if (sigismember(&context->uc_sigmask, SIGTRAP) != 0 || sigaction(SIGTRAP, NULL, &there) != 0 ||
        !(there.sa_flags & SA_SIGINFO) || there.sa_sigaction != heap_on_signal ||
        atomic_load_explicit(&heap_end.armed, memory_order_acquire)) {
        return 0;
    }
    if (heap_step.asked++ % HEAP_STEP_ASK == 0) {
        heap_step.traced = heap_traced();
    }
    return !heap_step.traced;
}

/* heap_step_ends hides what the instruction was shown, or lets it stay. */
static void heap_step_ends(int stay)
{
    for (uint32_t i = 0; i < heap_step.num; i++) {
        pye_heap *const heap = heap_find(heap_step.heaps[i]);

        if (heap != NULL) {
            pye_heap_stepped(heap, (uintptr_t)&heap_step, stay);
        }
    }
    heap_step.num = 0;
    heap_step.runs = 0;
}

/* heap_step_begins looks what the thread was at when it faulted. */
static void heap_step_begins(const greg_t *registers)
{
    const int flag = (registers[REG_EFL] & HEAP_TRAP_FLAG) != 0;

    if (heap_step.runs) {
        /* The same instruction touches another page; or another signal's handler runs it too. */
        if (registers[REG_RIP] == heap_step.at) {
            heap_step.lost = heap_step.lost || !flag;
            return;
        }
        heap_step_ends(0);
        heap_step.lost = !flag;
        heap_step.theirs = heap_step.theirs && flag;
    } else {
        heap_step.theirs = flag && !heap_step.lost;
        heap_step.lost = heap_step.lost && !flag;
    }
}

/* heap_step_knows notes that the instruction touches a heap; 0: too many. */
static int heap_step_knows(uintptr_t address)
{
    const pye_heap *const heap = heap_find(address);

    for (uint32_t i = 0; i < heap_step.num; i++) {
        if (heap_find(heap_step.heaps[i]) == heap) {
            return 1;
        }
    }
    if (heap_step.num == HEAP_STEP_HEAPS) {
        return 0;
    }
    heap_step.heaps[heap_step.num++] = address;
    return 1;
}

/* heap_show_zeros lets the instruction that faulted in an ended heap be repeated. Returns 0 if it
 * cannot. */
static int heap_show_zeros(pye_heap *heap, uintptr_t address, ucontext_t *context, int alone)
{
    greg_t *const registers = context->uc_mcontext.gregs;
    uintptr_t owner = 0;

    heap_step_begins(registers);
    if (!heap_can_step(context)) {
        heap_step_ends(1); /* it needs all its pages */
        heap_step.lost = 0;
        if (!heap_step.theirs) {
            registers[REG_EFL] &= ~(greg_t)HEAP_TRAP_FLAG;
        }
    } else if (heap_step_knows(address)) {
        owner = (uintptr_t)&heap_step;
    }
    const pye_status rc = pye_heap_zeros(heap, address, owner);
    if (rc == PYE_OK) {
        heap_step.runs = 1;
        heap_step.alone = (uint8_t)alone;
        heap_step.at = registers[REG_RIP];
        registers[REG_EFL] |= HEAP_TRAP_FLAG;
    } else {
        heap_stays_shown();
    }
    return rc == PYE_OK || rc == PYE_E_LIMIT || rc == PYE_E_STATE;
}

/* heap_trap returns 1 for the trap of an instruction that was shown zeros. */
static int heap_trap(const siginfo_t *info, ucontext_t *context)
{
    greg_t *const flags = &context->uc_mcontext.gregs[REG_EFL];

    if (info->si_code != TRAP_TRACE || !(heap_step.runs || heap_step.lost)) {
        return 0;
    }
    heap_step.lost = heap_step.lost && heap_step.runs;
    if (heap_step.runs) {
        const int stay = heap_step.used >= HEAP_STEPS || !heap_step.alone;

        heap_step_ends(stay);
        heap_step.used += heap_step.used < HEAP_STEPS;
        if (stay) {
            heap_stays_shown();
        }
        if (heap_step.theirs) {
            return 0;
        }
    }
    *flags &= ~(greg_t)HEAP_TRAP_FLAG;
    return 1;
}

#else

static void heap_step_again(void)
{
}

/* No other CPU lets a process step through itself: the page stays until others are shown. */
static int heap_show_zeros(pye_heap *heap, uintptr_t address, const ucontext_t *context, int alone)
{
    const pye_status rc = pye_heap_zeros(heap, address, 0);

    (void)context;
    (void)alone;
    heap_stays_shown();
    return rc == PYE_OK || rc == PYE_E_LIMIT || rc == PYE_E_STATE;
}

static int heap_trap(const siginfo_t *info, const ucontext_t *context)
{
    (void)info;
    (void)context;
    return 0;
}

#endif

/* heap_on_trap hands on what is not ours. A trap that comes back from the former handler is over. */
static void heap_on_trap(int number, siginfo_t *info, void *context)
{
    const struct sigaction *const before = &heap_before[heap_signal_index(number)].action;

    if (heap_trap(info, context)) {
        return;
    }
    if (before->sa_flags & SA_SIGINFO) {
        before->sa_sigaction(number, info, context);
    } else if (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN) {
        before->sa_handler(number);
    } else if (before->sa_handler == SIG_DFL || info->si_code > 0) {
        heap_default(number, info);
    }
}

static void heap_on_signal(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    pye_heap *heap = NULL;
    int reason = 0;

    if (number == SIGTRAP) {
        heap_on_trap(number, info, context);
        errno = saved;
        return;
    }
    if (info->si_code > 0) {
        heap = heap_find((uintptr_t)info->si_addr);
    }
    if (heap != NULL) {
        switch (pye_heap_fault(heap, (uintptr_t)info->si_addr,
                               heap_access(info, context) | PYE_FAULT_TELL)) {
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
    if (heap != NULL && reason != 0) {
        const heap_note_function note = atomic_load_explicit(&heap_note, memory_order_acquire);

        /* Before anything is shown: it may take long. */
        const int alone = note == NULL || note(heap, reason);
        /* Meanwhile it may have gone, and another may be there: then the fault comes again. */
        if (reason != HEAP_NOTE_FORKED && heap_find((uintptr_t)info->si_addr) == heap &&
            !heap_show_zeros(heap, (uintptr_t)info->si_addr, context, alone)) {
            heap = NULL;
        }
    }
    if (heap == NULL) {
        heap_chain(number, info, context);
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
    static const int numbers[3] = {SIGBUS, SIGSEGV, SIGTRAP};
    static int forks = 0;
    pye_status rc = PYE_OK;

    heap_table_enter();
    if (!forks) {
        forks = pthread_atfork(NULL, NULL, heap_after_fork) == 0;
        rc = forks ? PYE_OK : PYE_E_NO_MEMORY;
    }
    for (int i = 0; i < 3 && rc == PYE_OK; i++) {
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

static void heap_step_again(void)
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
