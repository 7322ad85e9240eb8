/* protect_avx.c - AVX's registers after a protected call (Intel SDM vol. 2, VZEROALL). */
#include "linux/protect_gate.h"

#if defined(__linux__) && defined(__x86_64__)

void pye_protect_clear_avx(void)
{
    __asm__ volatile("vzeroall" ::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                           "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

#endif
