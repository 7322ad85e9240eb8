/* sha512_lanes_avx512.c - SHA-384 of eight pages at once. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 8
#define PAGES_FUNCTION pye_sha384_pages_x8_avx512

typedef __m512i word;

static inline word splat(uint64_t x)
{
    return _mm512_set1_epi64((long long)x);
}

static inline word add(word a, word b)
{
    return _mm512_add_epi64(a, b);
}

static inline word xor3(word a, word b, word c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

static inline word choose(word e, word f, word g)
{
    return _mm512_ternarylogic_epi64(e, f, g, 0xca);
}

static inline word majority(word a, word b, word c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0xe8);
}

#define ror(x, n) _mm512_ror_epi64(x, n)
#define shr(x, n) _mm512_srli_epi64(x, n)

static inline word swap_bytes(word x)
{
    const word order = _mm512_broadcast_i32x4(
        _mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));

    return _mm512_shuffle_epi8(x, order);
}

/* Eight words of each of eight pages, turned so that word i of all pages stands in w[i]. */
static inline void load_rows(word w[8], const uint8_t *const pages[LANES], size_t at)
{
    word row[8];
    word pair[8];
    word quad[8];

    for (size_t i = 0; i < 8; i++) {
        row[i] = swap_bytes(_mm512_loadu_si512(pages[i] + at));
    }
    for (size_t i = 0; i < 8; i += 2) {
        pair[i] = _mm512_unpacklo_epi64(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi64(row[i], row[i + 1]);
    }
    for (size_t i = 0; i < 2; i++) {
        quad[i] = _mm512_shuffle_i64x2(pair[i], pair[i + 2], 0x88);
        quad[i + 2] = _mm512_shuffle_i64x2(pair[i], pair[i + 2], 0xdd);
        quad[i + 4] = _mm512_shuffle_i64x2(pair[i + 4], pair[i + 6], 0x88);
        quad[i + 6] = _mm512_shuffle_i64x2(pair[i + 4], pair[i + 6], 0xdd);
    }
    for (size_t i = 0; i < 4; i++) {
        /* quad[0]: words 0 and 4 of pages 0 … 3; quad[2]: words 2 and 6; odd ones: one more */
        w[i] = _mm512_shuffle_i64x2(quad[i], quad[i + 4], 0x88);
        w[i + 4] = _mm512_shuffle_i64x2(quad[i], quad[i + 4], 0xdd);
    }
}

static inline void store_word(uint64_t out[LANES], word x)
{
    _mm512_storeu_si512(out, x);
}

#include "crypto/sha512_lanes_impl.h"
#else
typedef int pye_sha512_lanes_avx512_is_for_x86; /* ISO C wants a declaration */
#endif
