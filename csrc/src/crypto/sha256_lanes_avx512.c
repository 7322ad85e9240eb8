/* sha256_lanes_avx512.c - SHA-256 of sixteen messages at once. */
#include "crypto/sha256_lanes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif
#include <immintrin.h>

#define LANES 16

typedef __m512i word;

#define splat(x) _mm512_set1_epi32((int)(x))
#define add(a, b) _mm512_add_epi32(a, b)
#define xor3(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0x96)
#define choose(e, f, g) _mm512_ternarylogic_epi32(e, f, g, 0xca)
#define majority(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0xe8)
#define ror(x, n) _mm512_ror_epi32(x, n)
#define shr(x, n) _mm512_srli_epi32(x, n)
#define load_word(p) _mm512_loadu_si512(p)
#define store_word(p, x) _mm512_storeu_si512(p, x)

/* Sixteen bytes of each of four lanes. */
static inline __attribute__((always_inline)) word
load_quarters(const uint8_t *const *data, size_t row, size_t at)
{
    const uint8_t *p0 = data[row] + at;
    const uint8_t *p1 = data[row + 4] + at;
    const uint8_t *p2 = data[row + 8] + at;
    const uint8_t *p3 = data[row + 12] + at;
    word x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)p0));

    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)p1), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)p2), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)p3), 3);
}

/* Sixteen words of each lane, turned so that word i of all lanes stands in w[i]: the loads bring
 * the quarters of a vector, which cost no shuffle, and four words are turned within them. */
static inline __attribute__((always_inline)) void load_rows(word w[16], const uint8_t *const *data,
                                                            size_t at)
{
    const word order = _mm512_broadcast_i32x4(
        _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));

#pragma GCC unroll 4
    for (size_t q = 0; q < 4; q++) {
        word row[4];

#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            row[i] = _mm512_shuffle_epi8(load_quarters(data, i, at + 16 * q), order);
        }
        const word low01 = _mm512_unpacklo_epi32(row[0], row[1]);
        const word high01 = _mm512_unpackhi_epi32(row[0], row[1]);
        const word low23 = _mm512_unpacklo_epi32(row[2], row[3]);
        const word high23 = _mm512_unpackhi_epi32(row[2], row[3]);

        /* quarter j of row i is lane 4 j + i, as it is in a vector of words */
        w[4 * q] = _mm512_unpacklo_epi64(low01, low23);
        w[4 * q + 1] = _mm512_unpackhi_epi64(low01, low23);
        w[4 * q + 2] = _mm512_unpacklo_epi64(high01, high23);
        w[4 * q + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
}

#include "crypto/sha256_lanes_impl.h"

const pye_sha256_lanes_code pye_sha256_lanes_avx512 = {"avx512", LANES, 9, blocks,
                                                       own, columns, expand};
#else
typedef int pye_sha256_lanes_avx512_is_for_x86; /* ISO C wants a declaration */
#endif
