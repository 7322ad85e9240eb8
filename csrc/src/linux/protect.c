/* protect.c - native functions behind a protection key (Intel SDM vol. 3, 4.6.2; pkeys(7)).
 *
 * Layout, in pages:  guard | inside: functions, copy of the ranges | memory | slot ... | guard
 * and of a slot:     guard | stack | what comes in | what goes out
 * All but the guards is behind the key; from the memory on, a forked child has nothing of it. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/protect_gate.h"
#include "linux/sys.h"
#include "pyenclave/protect.h"

#if defined(__linux__) && defined(__x86_64__)

#include <cpuid.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NR_PKEY_MPROTECT 329
#define NR_PKEY_ALLOC 330
#define NR_PKEY_FREE 331
#define NO_ACCESS 1u /* of a key's two bits in PKRU; the other forbids writing only */
#define BOTH 3u
#define PAGE ((size_t)PYE_PROTECT_PAGE)
#define MOST ((uint64_t)1 << 30)
#define TOP 64 /* bytes above a stack: the length that the function answers */

/* Behind the key, so that no stray write into it chooses what is called. */
typedef struct {
    void (*clear)(void);
    int tells_use;
    uint32_t num;
    protect_function functions[PYE_PROTECT_MAX_FUNCTIONS];
    size_t answered[PYE_PROTECT_MAX_SLOTS];
} inside_t;

#define INSIDE ((sizeof(inside_t) + PAGE - 1) / PAGE * PAGE)

/* Ordinary memory: nothing of it is secret, but who writes over it chooses where the key leads. */
struct pye_protect {
    uint8_t *base;
    inside_t *inside;
    uint8_t *memory;
    uint8_t *first_slot;
    size_t whole;
    size_t copy; /* bytes of all ranges */
    size_t memory_size;
    size_t stack;
    size_t message;
    size_t slot_size;
    _Atomic uint64_t taken;
    int64_t pid;
    int key; /* -1: none */
    uint32_t slots;
    uint32_t flags;
    uint32_t num_ranges;
    pye_protect_range ranges[PYE_PROTECT_MAX_RANGES];
};

static inline uint32_t read_pkru(void)
{
    uint32_t low;
    uint32_t high;

    __asm__ volatile(".byte 0x0f, 0x01, 0xee" : "=a"(low), "=d"(high) : "c"(0)); /* RDPKRU */
    (void)high;
    return low;
}

/* Looks again: who came to this WRPKRU by accident, with another value, does not get past it, and
 * the process ends (ERIM, section 3.3). Who chooses all registers does: `value` is in one, since
 * which key it is about is known at run time only. */
static inline void write_pkru(uint32_t value)
{
    __asm__ volatile(".byte 0x0f, 0x01, 0xef" : : "a"(value), "c"(0), "d"(0) : "memory");
    if (PYE_GUARD(read_pkru() != value)) {
        __builtin_trap();
    }
}

static inline uint32_t opened(const pye_protect *p)
{
    return read_pkru() & ~(BOTH << (2 * p->key));
}

static inline void open_key(const pye_protect *p)
{
    write_pkru(opened(p));
}

static inline void shut_key(const pye_protect *p)
{
    write_pkru(opened(p) | NO_ACCESS << (2 * p->key));
}

static pye_status tag(void *address, size_t size, int key)
{
    return pye_os_result(syscall(NR_PKEY_MPROTECT, address, size, PROT_READ | PROT_WRITE, key));
}

static uint8_t *stack_of(const pye_protect *p, uint32_t slot)
{
    return p->first_slot + slot * p->slot_size + PAGE;
}

static uint8_t *in_of(const pye_protect *p, uint32_t slot)
{
    return stack_of(p, slot) + p->stack;
}

static uint8_t *out_of(const pye_protect *p, uint32_t slot)
{
    return in_of(p, slot) + p->message;
}

/* The key must be open. */
static void copy_ranges(const pye_protect *p, int back)
{
    uint8_t *copy = (uint8_t *)p->inside + INSIDE;

    for (uint32_t i = 0; i < p->num_ranges; i++) {
        uint8_t *range = (uint8_t *)(uintptr_t)p->ranges[i].address;
        const size_t size = (size_t)p->ranges[i].size;
        memcpy(back ? range : copy, back ? copy : range, size);
        copy += size;
    }
}

static pye_status tag_ranges(const pye_protect *p, int key)
{
    pye_status rc = PYE_OK;

    for (uint32_t i = 0; i < p->num_ranges && rc == PYE_OK; i++) {
        rc = tag((uint8_t *)(uintptr_t)p->ranges[i].address, (size_t)p->ranges[i].size, key);
    }
    return rc;
}

static pye_status advise_ranges(const pye_protect *p, int advice)
{
    pye_status rc = PYE_OK;

    for (uint32_t i = 0; i < p->num_ranges && rc == PYE_OK; i++) {
        rc = pye_os_result(
            madvise((uint8_t *)(uintptr_t)p->ranges[i].address, (size_t)p->ranges[i].size, advice));
    }
    return rc;
}

static int overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return a < b ? b - a < a_size : a - b < b_size;
}

/* Whether some of `size` bytes at `at` lie behind the key, where the gate must not read or write
 * for its caller. */
static int is_behind(const pye_protect *p, const uint8_t *at, size_t size)
{
    const uint64_t start = (uint64_t)(uintptr_t)at;
    int found = overlap((uint64_t)(uintptr_t)p->base, p->whole, start, size);

    for (uint32_t i = 0; i < p->num_ranges; i++) {
        found |= overlap(p->ranges[i].address, p->ranges[i].size, start, size);
    }
    return found && size != 0;
}

static size_t pages(uint64_t size)
{
    return ((size_t)size + PAGE - 1) / PAGE * PAGE;
}

static pye_status check(const pye_protect_sizes *s, const pye_protect_range *ranges,
                        uint32_t num_ranges, uint32_t num_functions)
{
    PYE_REFUSE_IF(s->memory > MOST, PYE_E_LENGTH);
    PYE_REFUSE_IF(s->stack == 0 || s->stack > MOST, PYE_E_LENGTH);
    PYE_REFUSE_IF(s->message == 0 || s->message > MOST, PYE_E_LENGTH);
    PYE_REFUSE_IF(s->slots == 0 || s->slots > PYE_PROTECT_MAX_SLOTS, PYE_E_ARGUMENT);
    PYE_REFUSE_IF((s->flags & ~(uint32_t)PYE_PROTECT_LEAVE_SIGNALS) != 0, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_ranges > PYE_PROTECT_MAX_RANGES, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_functions > PYE_PROTECT_MAX_FUNCTIONS, PYE_E_ARGUMENT);
    for (uint32_t i = 0; i < num_ranges; i++) {
        PYE_REFUSE_IF(ranges[i].address % PAGE != 0 || ranges[i].size % PAGE != 0,
                      PYE_E_ALIGNMENT);
        PYE_REFUSE_IF(ranges[i].size == 0 || ranges[i].size > MOST, PYE_E_LENGTH);
    }
    return PYE_OK;
}

/* What is written for the library must be the library's. */
static int is_in(const pye_protect_range *ranges, uint32_t num, const pye_protect_arena *arena)
{
    const uint64_t at = (uint64_t)(uintptr_t)arena;
    int found = arena == NULL;

    for (uint32_t i = 0; i < num; i++) {
        found |= at >= ranges[i].address && at % 8 == 0 &&
                 at - ranges[i].address <= ranges[i].size - sizeof(*arena);
    }
    return found;
}

/* Puts every part of the new mapping behind the key. */
static pye_status tag_parts(pye_protect *p)
{
    uint8_t *end = p->base + p->whole;

    PYE_TRY(pye_os_result(madvise(p->base, p->whole, MADV_DONTDUMP)));
    PYE_TRY(pye_os_result(madvise(p->memory, (size_t)(end - p->memory), MADV_DONTFORK)));
    PYE_TRY(tag(p->inside, INSIDE + p->copy, p->key));
    if (p->memory_size != 0) {
        PYE_TRY(tag(p->memory, p->memory_size, p->key));
    }
    for (uint32_t i = 0; i < p->slots; i++) {
        PYE_TRY(tag(stack_of(p, i), p->slot_size - PAGE, p->key));
    }
    return PYE_OK;
}

static void lay_out(pye_protect *p, const pye_protect_sizes *s, const pye_protect_range *ranges,
                    uint32_t num_ranges)
{
    for (uint32_t i = 0; i < num_ranges; i++) {
        p->ranges[i] = ranges[i];
        p->copy += (size_t)ranges[i].size;
    }
    p->num_ranges = num_ranges;
    p->memory_size = pages(s->memory);
    p->stack = pages(s->stack);
    p->message = pages(s->message);
    p->slot_size = PAGE + p->stack + 2 * p->message;
    p->slots = s->slots;
    p->flags = s->flags;
    p->whole = 2 * PAGE + INSIDE + p->copy + p->memory_size + p->slots * p->slot_size;
    p->pid = (int64_t)getpid();
    p->key = -1;
}

static void place(pye_protect *p, uint8_t *base)
{
    p->base = base;
    p->inside = (inside_t *)(void *)(base + PAGE);
    p->memory = base + PAGE + INSIDE + p->copy;
    p->first_slot = p->memory + p->memory_size;
}

/* What the library can use, whatever the core was told to use: what the kernel saves (XCR0). */
static void choose_clearing(inside_t *inside)
{
    uint32_t low, b, c, d;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(d) : "c"(0));
    inside->clear = (low & 0xe6) == 0xe6  ? pye_protect_clear_avx512
                    : (low & 0x06) == 0x06 ? pye_protect_clear_avx
                                           : pye_protect_clear_sse;
    inside->tells_use = __get_cpuid_count(0xd, 1, &low, &b, &c, &d) && (low & 4) != 0;
}

static inline void clear_registers(const pye_protect *p)
{
    pye_protect_clear_other(p->inside->tells_use);
    p->inside->clear();
}

static void fill(pye_protect *p, const uint64_t *functions, uint32_t num, pye_protect_arena *arena)
{
    open_key(p);
    choose_clearing(p->inside);
    p->inside->num = num;
    for (uint32_t i = 0; i < num; i++) {
        const uintptr_t address = (uintptr_t)functions[i];
        memcpy(&p->inside->functions[i], &address, sizeof(address));
    }
    copy_ranges(p, 0);
    if (arena != NULL) {
        arena->start = (uint64_t)(uintptr_t)p->memory; /* never 0, even where there is none */
        arena->size = p->memory_size;
        arena->used = 0;
    }
    shut_key(p);
}

pye_status pye_protect_new(pye_protect **out, const pye_protect_sizes *sizes,
                           const pye_protect_range *ranges, uint32_t num_ranges,
                           const uint64_t *functions, uint32_t num_functions,
                           pye_protect_arena *arena)
{
    pye_status rc;
    pye_protect *p;
    void *base = MAP_FAILED;

    *out = NULL;
    PYE_TRY(check(sizes, ranges, num_ranges, num_functions));
    PYE_REFUSE_IF(!is_in(ranges, num_ranges, arena), PYE_E_ARGUMENT);
    PYE_REFUSE_IF((pye_cpu_features() & PYE_CPU_PKU) == 0, PYE_E_UNSUPPORTED);
    p = calloc(1, sizeof(*p));
    PYE_REFUSE_IF(p == NULL, PYE_E_NO_MEMORY);
    lay_out(p, sizes, ranges, num_ranges);
    p->key = (int)syscall(NR_PKEY_ALLOC, 0, NO_ACCESS);
    PYE_REQUIRE(p->key > 0, errno == ENOSPC ? PYE_E_LIMIT : pye_os_status(errno));
    base = mmap(NULL, p->whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    PYE_REQUIRE(base != MAP_FAILED, pye_os_status(errno));
    place(p, base);
    PYE_CHECK(tag_parts(p));
    PYE_CHECK(tag_ranges(p, p->key));
    PYE_CHECK(advise_ranges(p, MADV_DONTDUMP));
    fill(p, functions, num_functions, arena);
    *out = p;
    return PYE_OK;
done:;
    const int saved = errno;
    if (base != MAP_FAILED) {
        (void)tag_ranges(p, 0);
        (void)advise_ranges(p, MADV_DODUMP);
        (void)munmap(base, p->whole);
    }
    if (p->key > 0) {
        (void)syscall(NR_PKEY_FREE, p->key);
    }
    free(p);
    errno = saved;
    return rc;
}

pye_status pye_protect_free(pye_protect *protect, int at_exit)
{
    pye_protect *p = protect;

    if (p == NULL) {
        return PYE_OK;
    }
    const int child = p->pid != (int64_t)getpid();
    const size_t size = child ? (size_t)(p->memory - p->base) : p->whole;
    const int taken = !child && atomic_load_explicit(&p->taken, memory_order_acquire) != 0;
    if (taken && at_exit) {
        PYE_TRY(tag_ranges(p, 0));
    }
    PYE_REFUSE_IF(taken, PYE_E_BUSY);
    open_key(p);
    if (!child) {
        pye_wipe(p->memory, p->memory_size);
        for (uint32_t i = 0; i < p->slots; i++) {
            pye_wipe(stack_of(p, i), p->slot_size - PAGE);
        }
    }
    copy_ranges(p, 1);
    shut_key(p);
    PYE_TRY(advise_ranges(p, MADV_DODUMP));
    PYE_TRY(tag_ranges(p, 0));
    (void)munmap(p->base, size);
    (void)syscall(NR_PKEY_FREE, p->key);
    free(p);
    return PYE_OK;
}

pye_status pye_protect_take(pye_protect *protect, uint32_t *out_slot)
{
    uint64_t seen = atomic_load_explicit(&protect->taken, memory_order_relaxed);

    *out_slot = 0;
    for (;;) {
        const uint32_t slot = ~seen == 0 ? 64 : (uint32_t)__builtin_ctzll(~seen);
        PYE_REFUSE_IF(slot >= protect->slots, PYE_E_BUSY);
        if (atomic_compare_exchange_weak_explicit(&protect->taken, &seen,
                                                  seen | (uint64_t)1 << slot, memory_order_acquire,
                                                  memory_order_relaxed)) {
            *out_slot = slot;
            return PYE_OK;
        }
    }
}

void pye_protect_give(pye_protect *protect, uint32_t slot)
{
    (void)atomic_fetch_and_explicit(&protect->taken, ~((uint64_t)1 << slot), memory_order_release);
}

/* Every signal, also those that the C library keeps for itself: a handler would begin on the
 * protected stack with the key shut, or have the function's registers in its frame. */
static pye_status signals(const uint64_t *set, uint64_t *before)
{
    return pye_os_result(
        syscall(SYS_rt_sigprocmask, 2 /* SIG_SETMASK */, set, before, sizeof(*set)));
}

pye_status pye_protect_run(pye_protect *protect, uint32_t slot, uint32_t function,
                           pye_status *answer, uint8_t *out, size_t out_room, size_t *out_len,
                           const uint8_t *in, size_t in_len)
{
    const pye_protect *p = protect;
    const uint64_t all = ~(uint64_t)0;
    const int block = (p->flags & PYE_PROTECT_LEAVE_SIGNALS) == 0;
    uint64_t before = 0;
    pye_status status;

    *answer = PYE_E_STATE;
    *out_len = 0;
    PYE_REFUSE_IF(in_len > p->message, PYE_E_LENGTH);
    PYE_REFUSE_IF(slot >= p->slots, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(is_behind(p, in, in_len) || is_behind(p, out, out_room), PYE_E_ARGUMENT);
    uint8_t *const top = in_of(p, slot) - TOP;
    uint8_t *const result = out_of(p, slot);
    open_key(p);
    if (PYE_GUARD(function >= p->inside->num)) {
        shut_key(p);
        return PYE_E_ARGUMENT;
    }
    /* Before signals are blocked: `in` may be a sealed heap's, whose pages come by a signal. */
    memcpy(in_of(p, slot), in, in_len);
    if (block) {
        status = signals(&all, &before);
        if (PYE_GUARD(status != PYE_OK)) {
            shut_key(p);
            return status;
        }
    }
    *(size_t *)(void *)top = p->message;
    status = pye_protect_gate(in_of(p, slot), in_len, result, (size_t *)(void *)top,
                              p->inside->functions[function], top);
    size_t len = *(const volatile size_t *)(void *)top;
    if (PYE_GUARD(status != PYE_OK || len > p->message)) {
        /* What a failed function wrote must not become the tail of a later answer. */
        pye_wipe(result, p->message);
        status = status != PYE_OK ? status : PYE_E_LENGTH;
        len = 0;
    } else if (len <= out_room) {
        memcpy(out, result, len);
    }
    p->inside->answered[slot] = len;
    clear_registers(p);
    shut_key(p);
    if (block) {
        (void)signals(&before, NULL);
    }
    *answer = status;
    *out_len = len;
    return PYE_OK;
}

pye_status pye_protect_answer(pye_protect *protect, uint32_t slot, uint8_t *out, size_t len)
{
    const pye_protect *p = protect;
    pye_status rc = PYE_OK;

    PYE_REFUSE_IF(slot >= p->slots, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(is_behind(p, out, len), PYE_E_ARGUMENT);
    open_key(p);
    if (PYE_GUARD(len > p->inside->answered[slot])) {
        rc = PYE_E_LENGTH;
    } else {
        memcpy(out, out_of(p, slot), len);
    }
    p->inside->clear();
    shut_key(p);
    return rc;
}

#else

pye_status pye_protect_new(pye_protect **out, const pye_protect_sizes *sizes,
                           const pye_protect_range *ranges, uint32_t num_ranges,
                           const uint64_t *functions, uint32_t num_functions,
                           pye_protect_arena *arena)
{
    (void)sizes;
    (void)ranges;
    (void)num_ranges;
    (void)functions;
    (void)num_functions;
    (void)arena;
    *out = NULL;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_protect_free(pye_protect *protect, int at_exit)
{
    (void)protect;
    (void)at_exit;
    return PYE_OK;
}

pye_status pye_protect_take(pye_protect *protect, uint32_t *out_slot)
{
    (void)protect;
    *out_slot = 0;
    return PYE_E_UNSUPPORTED;
}

void pye_protect_give(pye_protect *protect, uint32_t slot)
{
    (void)protect;
    (void)slot;
}

pye_status pye_protect_run(pye_protect *protect, uint32_t slot, uint32_t function,
                           pye_status *answer, uint8_t *out, size_t out_room, size_t *out_len,
                           const uint8_t *in, size_t in_len)
{
    (void)protect;
    (void)slot;
    (void)function;
    (void)out;
    (void)out_room;
    (void)in;
    (void)in_len;
    *answer = PYE_E_UNSUPPORTED;
    *out_len = 0;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_protect_answer(pye_protect *protect, uint32_t slot, uint8_t *out, size_t len)
{
    (void)protect;
    (void)slot;
    (void)out;
    (void)len;
    return PYE_E_UNSUPPORTED;
}

#endif
