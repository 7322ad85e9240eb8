/* sha256_lanes.c - which lanes of SHA-256 a CPU is given. */
#include "crypto/sha256_lanes.h"

/* Fewer messages than are worth lanes of AVX-512 go four by four where that is quick. More do not:
 * it takes a tenth less on a quiet core, but a fifth more on one that is not (bench/README.md). */
#define FEW 9

const pye_sha256_lanes_code *pye_sha256_lanes_select(size_t num)
{
#if defined(__x86_64__)
    const uint32_t features = pye_cpu_features();

    if ((num < FEW || !(features & PYE_CPU_AVX512)) && (features & PYE_CPU_SHANI_FAST) &&
        (features & PYE_CPU_AVX) && pye_sha256_select() == PYE_SHA256_SHANI) {
        return &pye_sha256_lanes_shani;
    }
    if (features & PYE_CPU_AVX512) {
        return &pye_sha256_lanes_avx512;
    }
    /* Eight lanes without three-way logic and rotations lose against the SHA extensions. */
    if ((features & PYE_CPU_AVX2) && pye_sha256_select() == PYE_SHA256_PORTABLE) {
        return &pye_sha256_lanes_avx2;
    }
#else
    (void)num;
#endif
    return NULL;
}

void pye_sha256_gather2(uint32_t variant, uint32_t h0[8], const uint8_t *const *blocks0,
                        uint32_t h1[8], const uint8_t *const *blocks1, size_t num_blocks)
{
#if defined(__x86_64__)
    if (variant == PYE_SHA256_SHANI) {
        pye_sha256_gather2_shani(h0, blocks0, h1, blocks1, num_blocks);
        return;
    }
#endif
    pye_sha256_gather(variant, h0, blocks0, num_blocks);
    pye_sha256_gather(variant, h1, blocks1, num_blocks);
}
