/* protect_gate.c - the switch to a protected stack and back, and SSE's, x87's and AMX's registers
 * (System V ABI, AMD64, 3.2). Assembler, since no compiler may put a local on either stack
 * meanwhile. */
#include "linux/protect_gate.h"

#if defined(__linux__) && defined(__x86_64__)

/* rbp, which the function keeps, holds the caller's stack. To unwinders this is the outermost
 * frame: an exception that leaves the function ends the process, and never passes the code that
 * shuts the key. */
__asm__(".text\n"
        ".p2align 4\n"
        ".hidden pye_protect_gate\n"
        ".globl pye_protect_gate\n"
        ".type pye_protect_gate, @function\n"
        "pye_protect_gate:\n"
        ".cfi_startproc\n"
        ".cfi_undefined rip\n"
        "    endbr64\n"
        "    pushq %rbp\n"
        "    subq $16, %rsp\n"
        "    stmxcsr (%rsp)\n"
        "    movq %rsp, %rbp\n"
        "    movq %r9, %rsp\n" /* the switch */
        "    call *%r8\n"
        "    movq %rbp, %rsp\n"
        "    ldmxcsr (%rsp)\n" /* its flags tell of what was computed */
        "    addq $16, %rsp\n"
        "    popq %rbp\n"
        "    cld\n"
        "    movl %eax, %eax\n"
        "    xorl %ecx, %ecx\n"
        "    xorl %edx, %edx\n"
        "    xorl %esi, %esi\n"
        "    xorl %edi, %edi\n"
        "    xorl %r8d, %r8d\n"
        "    xorl %r9d, %r9d\n"
        "    xorl %r10d, %r10d\n"
        "    xorl %r11d, %r11d\n"
        "    ret\n"
        ".cfi_endproc\n"
        ".size pye_protect_gate, . - pye_protect_gate\n");

void pye_protect_clear_sse(void)
{
    __asm__ volatile("pxor %%xmm0, %%xmm0\n\tpxor %%xmm1, %%xmm1\n\t"
                     "pxor %%xmm2, %%xmm2\n\tpxor %%xmm3, %%xmm3\n\t"
                     "pxor %%xmm4, %%xmm4\n\tpxor %%xmm5, %%xmm5\n\t"
                     "pxor %%xmm6, %%xmm6\n\tpxor %%xmm7, %%xmm7\n\t"
                     "pxor %%xmm8, %%xmm8\n\tpxor %%xmm9, %%xmm9\n\t"
                     "pxor %%xmm10, %%xmm10\n\tpxor %%xmm11, %%xmm11\n\t"
                     "pxor %%xmm12, %%xmm12\n\tpxor %%xmm13, %%xmm13\n\t"
                     "pxor %%xmm14, %%xmm14\n\tpxor %%xmm15, %%xmm15"
                     :
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

/* XINUSE (Intel SDM vol. 1, 13.6); as the kernel does before it lets a processor sleep. */
static inline uint32_t in_use(void)
{
    uint32_t low;
    uint32_t high;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    (void)high;
    return low;
}

void pye_protect_clear_other(int tells_use)
{
    const uint32_t used = tells_use ? in_use() : 1u;
    uint16_t control;

    if (used & 1u) {
        __asm__ volatile("fnstcw %0\n\t"
                         "fninit\n\t"
                         "fldz\n\tfldz\n\tfldz\n\tfldz\n\tfldz\n\tfldz\n\tfldz\n\tfldz\n\t"
                         "fninit\n\t"
                         "fldcw %0"
                         : "=m"(control)
                         :
                         : "memory", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)",
                           "st(7)");
    }
    if (used & 3u << 17) {
        __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"); /* TILERELEASE */
    }
}

#endif
