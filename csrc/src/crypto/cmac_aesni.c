/* cmac_aesni.c - chained AES-128 with AES-NI (Intel SDM vol. 2, AESENC, AESKEYGENASSIST). */
#include "crypto/cmac.h"

#if defined(__x86_64__)
#pragma GCC target("sse2,aes")
#include <immintrin.h>

/* FIPS 197, 5.2: each word is the one four before it, xored with the new one before it. */
static inline __attribute__((always_inline)) __m128i next_key(__m128i key, __m128i assist)
{
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, _mm_shuffle_epi32(assist, 0xff));
}

#define STEP(i, rcon)                                                                              \
    do {                                                                                           \
        k = next_key(k, _mm_aeskeygenassist_si128(k, rcon));                                       \
        _mm_storeu_si128((__m128i *)(void *)key->round_keys[i], k);                                \
    } while (0)

void pye_cmac_expand_aesni(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE])
{
    __m128i k = _mm_loadu_si128((const __m128i *)(const void *)secret);

    _mm_storeu_si128((__m128i *)(void *)key->round_keys[0], k);
    STEP(1, 0x01);
    STEP(2, 0x02);
    STEP(3, 0x04);
    STEP(4, 0x08);
    STEP(5, 0x10);
    STEP(6, 0x20);
    STEP(7, 0x40);
    STEP(8, 0x80);
    STEP(9, 0x1b);
    STEP(10, 0x36);
}

void pye_cmac_chain_aesni(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                          size_t num_blocks)
{
    __m128i k[11];
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)state);

    for (size_t i = 0; i < 11; i++) {
        k[i] = _mm_loadu_si128((const __m128i *)(const void *)key->round_keys[i]);
    }
    for (size_t i = 0; i < num_blocks; i++) {
        const __m128i in = _mm_loadu_si128((const __m128i *)(const void *)(blocks + 16 * i));

        x = _mm_xor_si128(x, _mm_xor_si128(in, k[0]));
#pragma GCC unroll 9
        for (int r = 1; r < 10; r++) {
            x = _mm_aesenc_si128(x, k[r]);
        }
        x = _mm_aesenclast_si128(x, k[10]);
    }
    _mm_storeu_si128((__m128i *)(void *)state, x);
    pye_wipe(k, sizeof(k));
}
#else
typedef int pye_cmac_aesni_unused; /* a translation unit must not be empty */
#endif
