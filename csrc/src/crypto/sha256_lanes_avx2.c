/* sha256_lanes_avx2.c - SHA-256 of eight messages at once. */
#include "crypto/sha256_lanes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2")
#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif
#include <immintrin.h>

#define LANES 8

typedef __m256i word;

#define splat(x) _mm256_set1_epi32((int)(x))
#define add(a, b) _mm256_add_epi32(a, b)
#define xor3(a, b, c) _mm256_xor_si256(a, _mm256_xor_si256(b, c))
#define choose(e, f, g) _mm256_xor_si256(_mm256_and_si256(_mm256_xor_si256(f, g), e), g)
#define majority(a, b, c)                                                                          \
    _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)))
#define ror(x, n) _mm256_or_si256(_mm256_srli_epi32(x, n), _mm256_slli_epi32(x, 32 - (n)))
#define shr(x, n) _mm256_srli_epi32(x, n)
#define load_word(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define store_word(p, x) _mm256_storeu_si256((__m256i *)(void *)(p), x)

/* Sixteen bytes of each of two lanes. */
static inline __attribute__((always_inline)) word load_halves(const uint8_t *const *data,
                                                              size_t row, size_t at)
{
    const uint8_t *p0 = data[row] + at;
    const uint8_t *p1 = data[row + 4] + at;
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p0);

    return _mm256_inserti128_si256(_mm256_castsi128_si256(x),
                                   _mm_loadu_si128((const __m128i *)(const void *)p1), 1);
}

/* Sixteen words of each lane, turned so that word i of all lanes stands in w[i]. */
static inline __attribute__((always_inline)) void load_rows(word w[16], const uint8_t *const *data,
                                                            size_t at)
{
    const word order = _mm256_broadcastsi128_si256(
        _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));

    for (size_t q = 0; q < 4; q++) {
        word row[4];

        for (size_t i = 0; i < 4; i++) {
            row[i] = _mm256_shuffle_epi8(load_halves(data, i, at + 16 * q), order);
        }
        const word low01 = _mm256_unpacklo_epi32(row[0], row[1]);
        const word high01 = _mm256_unpackhi_epi32(row[0], row[1]);
        const word low23 = _mm256_unpacklo_epi32(row[2], row[3]);
        const word high23 = _mm256_unpackhi_epi32(row[2], row[3]);

        /* half j of row i is lane 4 j + i, as it is in a vector of words */
        w[4 * q] = _mm256_unpacklo_epi64(low01, low23);
        w[4 * q + 1] = _mm256_unpackhi_epi64(low01, low23);
        w[4 * q + 2] = _mm256_unpacklo_epi64(high01, high23);
        w[4 * q + 3] = _mm256_unpackhi_epi64(high01, high23);
    }
}

#include "crypto/sha256_lanes_impl.h"

const pye_sha256_lanes_code pye_sha256_lanes_avx2 = {"avx2", LANES, 9, blocks,
                                                     own, columns, expand};
#else
typedef int pye_sha256_lanes_avx2_is_for_x86; /* ISO C wants a declaration */
#endif
