/* protect_gate.h - the way into protected code and out again, with no register left behind. */
#ifndef PYE_SRC_LINUX_PROTECT_GATE_H
#define PYE_SRC_LINUX_PROTECT_GATE_H

#include "pyenclave/base.h"

#if defined(__linux__) && defined(__x86_64__)

typedef pye_status (*protect_function)(const uint8_t *in, size_t in_len, uint8_t *out,
                                       size_t *out_len);

/* pye_protect_gate calls `function` on the stack that ends at `stack_top` (aligned to 64) and
 * returns its status on the caller's. Integer registers that a call may change are 0 afterwards,
 * and MXCSR is as it was. */
pye_status pye_protect_gate(const uint8_t *in, size_t in_len, uint8_t *out, size_t *out_len,
                            protect_function function, uint8_t *stack_top);

/* Zero every vector register of the instruction set, for whoever has no larger one. AVX-512's
 * needs nothing but its foundation (F). */
void pye_protect_clear_sse(void);
void pye_protect_clear_avx(void);
__attribute__((target("avx512f,avx512vl"))) void pye_protect_clear_avx512(void);
/* Zero x87's and MMX's registers and AMX's tiles, if they are in use; x87's control word stays.
 * `tells_use`: the CPU knows XGETBV with 1, which tells it; else x87 is cleared each time. */
void pye_protect_clear_other(int tells_use);

#endif
#endif
