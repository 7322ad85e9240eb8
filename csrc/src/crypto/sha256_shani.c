/* sha256_shani.c - SHA-256's block function with the SHA extensions (Intel SDM vol. 2, SHA256*).
 *
 * The rounds are one chain of sha256rnds2, 32 a block; everything else hides in its latency. So a
 * stream whose blocks lie apart costs nothing more than one that lies in one piece, if the state
 * stays in registers: that is what pye_sha256_gather_shani is for. */
#include "crypto/sha256_lanes.h"

#if defined(__x86_64__)
#pragma GCC target("sse2,ssse3,sha")
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* The instructions want the state as the words {F, E, B, A} and {H, G, D, C}, lowest first. */
INLINE void load_state(__m128i *abef, __m128i *cdgh, const uint32_t h[8])
{
    const __m128i dcba = _mm_loadu_si128((const __m128i *)(const void *)h);
    const __m128i hgfe = _mm_loadu_si128((const __m128i *)(const void *)(h + 4));
    const __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1b);

    *abef = _mm_alignr_epi8(cdab, efgh, 8);
    *cdgh = _mm_castps_si128(
        _mm_shuffle_ps(_mm_castsi128_ps(efgh), _mm_castsi128_ps(cdab), _MM_SHUFFLE(3, 2, 1, 0)));
}

INLINE void store_state(uint32_t h[8], __m128i abef, __m128i cdgh)
{
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    const __m128i dcba = _mm_castps_si128(
        _mm_shuffle_ps(_mm_castsi128_ps(feba), _mm_castsi128_ps(dchg), _MM_SHUFFLE(3, 2, 1, 0)));
    const __m128i hgfe = _mm_alignr_epi8(dchg, feba, 8);

    _mm_storeu_si128((__m128i *)(void *)h, dcba);
    _mm_storeu_si128((__m128i *)(void *)(h + 4), hgfe);
}

/* Four rounds on the message words `w`. */
INLINE void rounds4(__m128i *abef, __m128i *cdgh, __m128i w, const uint32_t *k)
{
    const __m128i wk = _mm_add_epi32(w, _mm_load_si128((const __m128i *)(const void *)k));

    *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, wk);
    *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32(wk, 0x0e));
}

/* The next four message words from the last sixteen, oldest in `w0`. */
INLINE __m128i schedule(__m128i w0, __m128i w1, __m128i w2, __m128i w3)
{
    const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));

    return _mm_sha256msg2_epu32(sum, w3);
}

INLINE void block(__m128i *abef, __m128i *cdgh, const uint8_t *data)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    const __m128i abef_in = *abef;
    const __m128i cdgh_in = *cdgh;
    __m128i w[4];

    for (int i = 0; i < 4; i++) {
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data + 16 * i)),
                                swap);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        rounds4(abef, cdgh, w[r & 3], pye_sha256_k + 4 * r);
        if (r < 12) {
            w[r & 3] = schedule(w[r & 3], w[(r + 1) & 3], w[(r + 2) & 3], w[(r + 3) & 3]);
        }
    }
    *abef = _mm_add_epi32(*abef, abef_in);
    *cdgh = _mm_add_epi32(*cdgh, cdgh_in);
}

void pye_sha256_blocks_shani(uint32_t h[8], const uint8_t *data, size_t num_blocks)
{
    __m128i abef;
    __m128i cdgh;

    load_state(&abef, &cdgh, h);
    for (size_t i = 0; i < num_blocks; i++) {
        block(&abef, &cdgh, data + i * PYE_SHA256_BLOCK_SIZE);
    }
    store_state(h, abef, cdgh);
}

void pye_sha256_gather_shani(uint32_t h[8], const uint8_t *const *blocks, size_t num_blocks)
{
    __m128i abef;
    __m128i cdgh;

    load_state(&abef, &cdgh, h);
    for (size_t i = 0; i < num_blocks; i++) {
        block(&abef, &cdgh, blocks[i]);
    }
    store_state(h, abef, cdgh);
}

/* Two messages fill the latency of each other's rounds. */
INLINE void block2(__m128i state[4], const uint8_t *data0, const uint8_t *data1)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    const __m128i in[4] = {state[0], state[1], state[2], state[3]};
    __m128i w[4];
    __m128i v[4];

    for (int i = 0; i < 4; i++) {
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data0 + 16 * i)),
                                swap);
        v[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data1 + 16 * i)),
                                swap);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        rounds4(&state[0], &state[1], w[r & 3], pye_sha256_k + 4 * r);
        rounds4(&state[2], &state[3], v[r & 3], pye_sha256_k + 4 * r);
        if (r < 12) {
            w[r & 3] = schedule(w[r & 3], w[(r + 1) & 3], w[(r + 2) & 3], w[(r + 3) & 3]);
            v[r & 3] = schedule(v[r & 3], v[(r + 1) & 3], v[(r + 2) & 3], v[(r + 3) & 3]);
        }
    }
    for (int i = 0; i < 4; i++) {
        state[i] = _mm_add_epi32(state[i], in[i]);
    }
}

void pye_sha256_gather2_shani(uint32_t h0[8], const uint8_t *const *blocks0, uint32_t h1[8],
                              const uint8_t *const *blocks1, size_t num_blocks)
{
    __m128i state[4];

    load_state(&state[0], &state[1], h0);
    load_state(&state[2], &state[3], h1);
    for (size_t i = 0; i < num_blocks; i++) {
        block2(state, blocks0[i], blocks1[i]);
    }
    store_state(h0, state[0], state[1]);
    store_state(h1, state[2], state[3]);
}
#else
typedef int pye_sha256_shani_unused; /* a translation unit must not be empty */
#endif
