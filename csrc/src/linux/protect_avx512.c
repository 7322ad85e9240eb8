/* protect_avx512.c - AVX-512's registers after a protected call: VZEROALL knows the lower sixteen
 * (Intel SDM vol. 2, VZEROALL, VPXORQ, KXORW, which clears all 64 bits). */
#include "linux/protect_gate.h"

#if defined(__linux__) && defined(__x86_64__)

void pye_protect_clear_avx512(void)
{
    __asm__ volatile("vzeroall\n\t"
                     "vpxorq %%zmm16, %%zmm16, %%zmm16\n\t"
                     "vpxorq %%zmm17, %%zmm17, %%zmm17\n\t"
                     "vpxorq %%zmm18, %%zmm18, %%zmm18\n\t"
                     "vpxorq %%zmm19, %%zmm19, %%zmm19\n\t"
                     "vpxorq %%zmm20, %%zmm20, %%zmm20\n\t"
                     "vpxorq %%zmm21, %%zmm21, %%zmm21\n\t"
                     "vpxorq %%zmm22, %%zmm22, %%zmm22\n\t"
                     "vpxorq %%zmm23, %%zmm23, %%zmm23\n\t"
                     "vpxorq %%zmm24, %%zmm24, %%zmm24\n\t"
                     "vpxorq %%zmm25, %%zmm25, %%zmm25\n\t"
                     "vpxorq %%zmm26, %%zmm26, %%zmm26\n\t"
                     "vpxorq %%zmm27, %%zmm27, %%zmm27\n\t"
                     "vpxorq %%zmm28, %%zmm28, %%zmm28\n\t"
                     "vpxorq %%zmm29, %%zmm29, %%zmm29\n\t"
                     "vpxorq %%zmm30, %%zmm30, %%zmm30\n\t"
                     "vpxorq %%zmm31, %%zmm31, %%zmm31\n\t"
                     "kxorw %%k0, %%k0, %%k0\n\t"
                     "kxorw %%k1, %%k1, %%k1\n\t"
                     "kxorw %%k2, %%k2, %%k2\n\t"
                     "kxorw %%k3, %%k3, %%k3\n\t"
                     "kxorw %%k4, %%k4, %%k4\n\t"
                     "kxorw %%k5, %%k5, %%k5\n\t"
                     "kxorw %%k6, %%k6, %%k6\n\t"
                     "kxorw %%k7, %%k7, %%k7"
                     :
                     :
                     : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
                       "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
                       "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1",
                       "k2", "k3", "k4", "k5", "k6", "k7");
}

#endif
