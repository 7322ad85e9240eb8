/* sha512_lanes_avx2.c - SHA-384 of four pages at once. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 4
#define PAGES_FUNCTION pye_sha384_pages_x4_avx2

typedef __m256i word;

static inline word splat(uint64_t x)
{
    return _mm256_set1_epi64x((long long)x);
}

static inline word add(word a, word b)
{
    return _mm256_add_epi64(a, b);
}

static inline word xor3(word a, word b, word c)
{
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
}

static inline word choose(word e, word f, word g)
{
    return _mm256_xor_si256(_mm256_and_si256(_mm256_xor_si256(f, g), e), g);
}

static inline word majority(word a, word b, word c)
{
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
}

#define ror(x, n) _mm256_or_si256(_mm256_srli_epi64(x, n), _mm256_slli_epi64(x, 64 - (n)))
#define shr(x, n) _mm256_srli_epi64(x, n)

static inline word load(const uint8_t *at)
{
    const word order = _mm256_broadcastsi128_si256(
        _mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    word x;

    __builtin_memcpy(&x, at, sizeof(x));
    return _mm256_shuffle_epi8(x, order);
}

/* Eight words of each of four pages, turned so that word i of all pages stands in w[i]. */
static inline void load_rows(word w[8], const uint8_t *const pages[LANES], size_t at)
{
    for (size_t half = 0; half < 2; half++) {
        const word r0 = load(pages[0] + at + half * 32);
        const word r1 = load(pages[1] + at + half * 32);
        const word r2 = load(pages[2] + at + half * 32);
        const word r3 = load(pages[3] + at + half * 32);
        const word low01 = _mm256_unpacklo_epi64(r0, r1);
        const word high01 = _mm256_unpackhi_epi64(r0, r1);
        const word low23 = _mm256_unpacklo_epi64(r2, r3);
        const word high23 = _mm256_unpackhi_epi64(r2, r3);

        w[4 * half] = _mm256_permute2x128_si256(low01, low23, 0x20);
        w[4 * half + 1] = _mm256_permute2x128_si256(high01, high23, 0x20);
        w[4 * half + 2] = _mm256_permute2x128_si256(low01, low23, 0x31);
        w[4 * half + 3] = _mm256_permute2x128_si256(high01, high23, 0x31);
    }
}

static inline void store_word(uint64_t out[LANES], word x)
{
    __builtin_memcpy(out, &x, sizeof(x));
}

#include "crypto/sha512_lanes_impl.h"
#else
typedef int pye_sha512_lanes_avx2_is_for_x86; /* ISO C wants a declaration */
#endif
