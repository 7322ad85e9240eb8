/* protected_probe.c - what the rest of a process sees of protected code: PKRU, registers, signals.
 *
 * Built together with the gate's own sources, so that these can be tried without a key. */
#define _GNU_SOURCE
#include "linux/protect_gate.h"

#include <immintrin.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define SHOWN __attribute__((visibility("default")))

typedef pye_status (*run_function)(void *protect, uint32_t slot, uint32_t function,
                                   pye_status *answer, uint8_t *out, size_t out_room,
                                   size_t *out_len, const uint8_t *in, size_t in_len);

/* 0: SSE, 1: AVX, 2: AVX-512 */
static int level(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
}

SHOWN uint32_t probe_pkru(void)
{
    uint32_t low;
    uint32_t high;

    __asm__ volatile(".byte 0x0f, 0x01, 0xee" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

#define EACH16(X)                                                                                  \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define UPPER16(X)                                                                                 \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define FILL_SSE(n) "movups (%0), %%xmm" #n "\n\t"
#define FILL_AVX(n) "vmovups (%0), %%ymm" #n "\n\t"
#define FILL_WIDE(n) "vmovups (%0), %%zmm" #n "\n\t"
#define TAKE_SSE(n) "movups %%xmm" #n ", 64*" #n "(%0)\n\t"
#define TAKE_AVX(n) "vmovups %%ymm" #n ", 64*" #n "(%0)\n\t"
#define TAKE_WIDE(n) "vmovups %%zmm" #n ", 64*" #n "(%0)\n\t"
#define TAKE_MASK(n) "kmovq %%k" #n ", 2048+8*" #n "(%0)\n\t"
#define MASKS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define FILL_MASK(n) "kmovq (%0), %%k" #n "\n\t"

static inline __attribute__((always_inline)) void take(uint8_t *registers, int wide)
{
    if (wide == 2) {
        __asm__ volatile(EACH16(TAKE_WIDE) UPPER16(TAKE_WIDE) MASKS(TAKE_MASK)::"r"(registers)
                         : "memory");
    } else if (wide == 1) {
        __asm__ volatile(EACH16(TAKE_AVX)::"r"(registers) : "memory");
    } else {
        __asm__ volatile(EACH16(TAKE_SSE)::"r"(registers) : "memory");
    }
}

/* FXSAVE's image, 512 bytes: x87's registers from byte 32, MXCSR at 24, the control word at 0. */
static inline __attribute__((always_inline)) void take_x87(uint8_t *image)
{
    uint8_t aligned[512] __attribute__((aligned(16))) = {0};

    __asm__ volatile("fxsave (%0)" ::"r"(aligned) : "memory");
    memcpy(image, aligned, sizeof(aligned));
}

/* All eight of x87's registers hold pi, and are said to be empty, as after a function. */
static inline __attribute__((always_inline)) void fill_x87(void)
{
    __asm__ volatile("fldpi\n\tfldpi\n\tfldpi\n\tfldpi\n\t"
                     "fldpi\n\tfldpi\n\tfldpi\n\tfldpi\n\temms");
}

/* A protected function: leaves a pattern in every vector register, and in rcx, rdx, rsi, rdi and
 * r8 to r11, pi in x87's, and flags in MXCSR. Its own stack pointer is its answer. */
SHOWN pye_status probe_fill(const uint8_t *in, size_t in_len, uint8_t *out, size_t *out_len)
{
    static const uint8_t pattern[64] = {
        0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5,
        0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5,
        0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5,
        0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5,
        0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5, 0xa5,
        0xa5, 0xa5, 0xa5, 0xa5};
    const uint64_t here = (uint64_t)(uintptr_t)__builtin_frame_address(0);
    const int wide = level();
    const uint32_t flags = 0x9fbf;

    (void)in;
    (void)in_len;
    memcpy(out, &here, sizeof(here));
    *out_len = sizeof(here);
    fill_x87();
    __asm__ volatile("ldmxcsr %0" ::"m"(flags));
    if (wide == 2) {
        __asm__ volatile(EACH16(FILL_WIDE) UPPER16(FILL_WIDE) MASKS(FILL_MASK)::"r"(pattern));
    } else if (wide == 1) {
        __asm__ volatile(EACH16(FILL_AVX)::"r"(pattern));
    } else {
        __asm__ volatile(EACH16(FILL_SSE)::"r"(pattern));
    }
    __asm__ volatile("movq (%0), %%rcx\n\tmovq %%rcx, %%rdx\n\tmovq %%rcx, %%rsi\n\t"
                     "movq %%rcx, %%rdi\n\tmovq %%rcx, %%r8\n\tmovq %%rcx, %%r9\n\t"
                     "movq %%rcx, %%r10\n\tmovq %%rcx, %%r11"
                     :
                     : "a"(pattern)
                     : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11");
    return 0;
}

/* Runs a function behind the key, and takes the vector registers as they are on return (2112
 * bytes; those that the CPU has not stay 0), and FXSAVE's image after them. */
SHOWN pye_status probe_run(run_function run, void *protect, uint32_t slot, uint32_t function,
                           pye_status *answer, uint64_t *where, uint8_t *registers)
{
    size_t len;
    const int wide = level();
    const uint32_t before = _mm_getcsr();

    _mm_setcsr(0x1f80);
    const pye_status rc = run(protect, slot, function, answer, (uint8_t *)where, sizeof(*where),
                              &len, (const uint8_t *)where, 0);
    take(registers, wide);
    take_x87(registers + 2112);
    _mm_setcsr(before);
    return rc;
}

/* The same by the gate alone, without a key, on the stack that ends at `top`; `clear` is 0 for
 * none, else 1 + the level. `integers` gets rcx, rdx, rsi, rdi and r8 to r11, `mxcsr` the register
 * before and after. */
SHOWN pye_status probe_gate(uint8_t *top, int clear, uint64_t *where, uint8_t *registers,
                            uint64_t *integers, uint32_t *mxcsr)
{
    static void (*const clears[])(void) = {pye_protect_clear_sse, pye_protect_clear_avx,
                                           pye_protect_clear_avx512};
    const int wide = level();
    size_t len = 8;
    const uint8_t *in = registers;
    register const uint8_t *a1 __asm__("rdi") = in;
    register uint64_t a2 __asm__("rsi") = 0;
    register uint64_t *a3 __asm__("rdx") = where;
    register size_t *a4 __asm__("rcx") = &len;
    register protect_function a5 __asm__("r8") = probe_fill;
    register uint8_t *a6 __asm__("r9") = top;
    uint64_t rc;

    mxcsr[0] = _mm_getcsr();
    __asm__ volatile("pushq %[integers]\n\t"
                     "subq $8, %%rsp\n\t"
                     "call pye_protect_gate\n\t"
                     "addq $8, %%rsp\n\t"
                     "movq (%%rsp), %%rbx\n\t"
                     "movq %%rcx, (%%rbx)\n\tmovq %%rdx, 8(%%rbx)\n\tmovq %%rsi, 16(%%rbx)\n\t"
                     "movq %%rdi, 24(%%rbx)\n\tmovq %%r8, 32(%%rbx)\n\tmovq %%r9, 40(%%rbx)\n\t"
                     "movq %%r10, 48(%%rbx)\n\tmovq %%r11, 56(%%rbx)\n\t"
                     "addq $8, %%rsp"
                     : "=a"(rc), "+r"(a1), "+r"(a2), "+r"(a3), "+r"(a4), "+r"(a5), "+r"(a6)
                     : [integers] "r"(integers)
                     : "rbx", "r10", "r11", "memory", "cc");
    mxcsr[1] = _mm_getcsr();
    if (clear != 0) {
        clears[clear - 1]();
    }
    take(registers, wide);
    return (pye_status)rc;
}

/* x87's registers and its control word, before and after they are cleared (1024 bytes). */
SHOWN void probe_other(int tells_use, int fill, uint8_t *images)
{
    const uint16_t mine = 0x027f; /* as the default, but with a precision of 53 bits */
    uint16_t before;

    __asm__ volatile("fnstcw %0\n\tfldcw %1" : "=m"(before) : "m"(mine));
    if (fill) {
        fill_x87();
    }
    take_x87(images);
    pye_protect_clear_other(tells_use);
    take_x87(images + 512);
    __asm__ volatile("fldcw %0" ::"m"(before));
}

SHOWN int probe_level(void)
{
    return level();
}

static volatile uint32_t seen_count;
static volatile uint32_t seen_pkru;
static volatile uint64_t seen_stack;

static void handler(int number)
{
    (void)number;
    seen_pkru = probe_pkru();
    seen_stack = (uint64_t)(uintptr_t)__builtin_frame_address(0);
    seen_count++;
}

/* A handler that notes with which rights and on which stack it runs. */
SHOWN int probe_handle(int number, int on_stack)
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    action.sa_handler = handler;
    action.sa_flags = on_stack ? SA_ONSTACK : 0;
    seen_count = 0;
    return sigaction(number, &action, NULL);
}

SHOWN uint32_t probe_handled(uint32_t *pkru, uint64_t *stack)
{
    *pkru = seen_pkru;
    *stack = seen_stack;
    return seen_count;
}

/* A stack for this thread's handlers, in ordinary memory. */
SHOWN int probe_alternate(void)
{
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};

    return sigaltstack(&stack, NULL);
}
