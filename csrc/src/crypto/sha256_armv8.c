/* sha256_armv8.c - SHA-256's block function with AArch64's SHA256H, SHA256H2, SHA256SU0 and
 * SHA256SU1 (Arm ARM, C7.2). The state stays in registers over blocks that lie apart, as in
 * sha256_shani.c. */
#include "crypto/sha256.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha2"))), apply_to = function)
#else
#pragma GCC target("+crypto")
#endif
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint32x4_t abcd;
    uint32x4_t efgh;
} state;

INLINE state load_state(const uint32_t h[8])
{
    return (state){vld1q_u32(h), vld1q_u32(h + 4)};
}

INLINE void store_state(uint32_t h[8], state s)
{
    vst1q_u32(h, s.abcd);
    vst1q_u32(h + 4, s.efgh);
}

/* Four rounds on the message words `w`. */
INLINE state rounds4(state s, uint32x4_t w, const uint32_t *k)
{
    const uint32x4_t wk = vaddq_u32(w, vld1q_u32(k));

    return (state){vsha256hq_u32(s.abcd, s.efgh, wk), vsha256h2q_u32(s.efgh, s.abcd, wk)};
}

/* The next four message words from the last sixteen, oldest in `w0`. */
INLINE uint32x4_t schedule(uint32x4_t w0, uint32x4_t w1, uint32x4_t w2, uint32x4_t w3)
{
    return vsha256su1q_u32(vsha256su0q_u32(w0, w1), w2, w3);
}

INLINE state block(state s, const uint8_t *data)
{
    const state before = s;
    uint32x4_t w[4];

    for (int i = 0; i < 4; i++) {
        w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        s = rounds4(s, w[r & 3], pye_sha256_k + 4 * r);
        if (r < 12) {
            w[r & 3] = schedule(w[r & 3], w[(r + 1) & 3], w[(r + 2) & 3], w[(r + 3) & 3]);
        }
    }
    return (state){vaddq_u32(s.abcd, before.abcd), vaddq_u32(s.efgh, before.efgh)};
}

void pye_sha256_blocks_armv8(uint32_t h[8], const uint8_t *data, size_t num_blocks)
{
    state s = load_state(h);

    for (size_t i = 0; i < num_blocks; i++) {
        s = block(s, data + i * PYE_SHA256_BLOCK_SIZE);
    }
    store_state(h, s);
}

void pye_sha256_gather_armv8(uint32_t h[8], const uint8_t *const *blocks, size_t num_blocks)
{
    state s = load_state(h);

    for (size_t i = 0; i < num_blocks; i++) {
        s = block(s, blocks[i]);
    }
    store_state(h, s);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pye_sha256_armv8_unused; /* a translation unit must not be empty */
#endif
