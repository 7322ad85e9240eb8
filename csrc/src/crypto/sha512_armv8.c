/* sha512_armv8.c - the block function of SHA-384 and SHA-512 with AArch64's SHA512H, SHA512H2,
 * SHA512SU0 and SHA512SU1 (Arm ARM, C7.2; Armv8.2). A register has two words, two rounds go at
 * once. */
#include "crypto/sha512_lanes.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha3"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+sha3")
#endif
#include <arm_neon.h>

void pye_sha512_blocks_armv8(uint64_t h[8], const uint8_t *data, size_t num_blocks)
{
    uint64x2_t ab = vld1q_u64(h);
    uint64x2_t cd = vld1q_u64(h + 2);
    uint64x2_t ef = vld1q_u64(h + 4);
    uint64x2_t gh = vld1q_u64(h + 6);
    uint64x2_t w[8];

    for (; num_blocks != 0; data += PYE_SHA512_BLOCK_SIZE, num_blocks--) {
        const uint64x2_t ab_in = ab;
        const uint64x2_t cd_in = cd;
        const uint64x2_t ef_in = ef;
        const uint64x2_t gh_in = gh;

        for (int i = 0; i < 8; i++) {
            w[i] = vreinterpretq_u64_u8(vrev64q_u8(vld1q_u8(data + 16 * i)));
        }
        /* Eight steps of two rounds a turn: then w is at its beginning again. */
        for (int turn = 0; turn < 5; turn++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const uint64x2_t wk = vaddq_u64(w[i], vld1q_u64(pye_sha512_k + 16 * turn + 2 * i));
                uint64x2_t sum = vaddq_u64(gh, vextq_u64(wk, wk, 1));

                sum = vsha512hq_u64(sum, vextq_u64(ef, gh, 1), vextq_u64(cd, ef, 1));
                gh = ef;
                ef = vaddq_u64(cd, sum);
                sum = vsha512h2q_u64(sum, cd, ab);
                cd = ab;
                ab = sum;
                if (turn < 4) {
                    w[i] = vsha512su1q_u64(vsha512su0q_u64(w[i], w[(i + 1) & 7]), w[(i + 7) & 7],
                                           vextq_u64(w[(i + 4) & 7], w[(i + 5) & 7], 1));
                }
            }
        }
        ab = vaddq_u64(ab, ab_in);
        cd = vaddq_u64(cd, cd_in);
        ef = vaddq_u64(ef, ef_in);
        gh = vaddq_u64(gh, gh_in);
    }
    vst1q_u64(h, ab);
    vst1q_u64(h + 2, cd);
    vst1q_u64(h + 4, ef);
    vst1q_u64(h + 6, gh);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pye_sha512_armv8_unused; /* a translation unit must not be empty */
#endif
