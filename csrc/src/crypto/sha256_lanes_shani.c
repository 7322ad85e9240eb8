/* sha256_lanes_shani.c - SHA-256 of four messages at once with the SHA extensions, where the
 * processor begins one sha256rnds2 a cycle (PYE_CPU_SHANI_FAST).
 *
 * Two rounds take four cycles before the next two of the same message can begin, so four messages fill
 * them. The words of a message stay in memory, all but its newest four: what else has to be in the
 * sixteen registers that these instructions know are the states. */
#include "crypto/sha256_lanes.h"

#if defined(__x86_64__)
#pragma GCC target("avx,sha")
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 4
#define COLUMN 64 /* words of an expanded block, which lie side by side here */

/* The state of message i: s[2 i] has the words {F, E, B, A}, s[2 i + 1] {H, G, D, C}, lowest first. */
typedef struct {
    __m128i s[2 * LANES];
} states;

INLINE __m128i load(const void *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

INLINE void store(void *p, __m128i x)
{
    _mm_storeu_si128((__m128i *)p, x);
}

INLINE void transpose(__m128i out[4], __m128i r0, __m128i r1, __m128i r2, __m128i r3)
{
    const __m128i low01 = _mm_unpacklo_epi32(r0, r1);
    const __m128i high01 = _mm_unpackhi_epi32(r0, r1);
    const __m128i low23 = _mm_unpacklo_epi32(r2, r3);
    const __m128i high23 = _mm_unpackhi_epi32(r2, r3);

    out[0] = _mm_unpacklo_epi64(low01, low23);
    out[1] = _mm_unpackhi_epi64(low01, low23);
    out[2] = _mm_unpacklo_epi64(high01, high23);
    out[3] = _mm_unpackhi_epi64(high01, high23);
}

INLINE states load_states(const pye_sha256_lanes *lanes)
{
    states to;
    __m128i half[LANES];

    transpose(half, load(lanes->h[5]), load(lanes->h[4]), load(lanes->h[1]), load(lanes->h[0]));
    for (size_t i = 0; i < LANES; i++) {
        to.s[2 * i] = half[i];
    }
    transpose(half, load(lanes->h[7]), load(lanes->h[6]), load(lanes->h[3]), load(lanes->h[2]));
    for (size_t i = 0; i < LANES; i++) {
        to.s[2 * i + 1] = half[i];
    }
    return to;
}

INLINE void store_states(pye_sha256_lanes *lanes, const states *from)
{
    static const uint8_t even[4] = {5, 4, 1, 0};
    static const uint8_t odd[4] = {7, 6, 3, 2};
    const __m128i *s = from->s;
    __m128i half[4];

    transpose(half, s[0], s[2], s[4], s[6]);
    for (size_t i = 0; i < 4; i++) {
        store(lanes->h[even[i]], half[i]);
    }
    transpose(half, s[1], s[3], s[5], s[7]);
    for (size_t i = 0; i < 4; i++) {
        store(lanes->h[odd[i]], half[i]);
    }
}

INLINE states sum(states a, states b)
{
    for (size_t i = 0; i < 2 * LANES; i++) {
        a.s[i] = _mm_add_epi32(a.s[i], b.s[i]);
    }
    return a;
}

/* Four rounds of message i; `words` have their constants. */
INLINE void rounds4(states *to, size_t i, __m128i words)
{
    __m128i *s = to->s + 2 * i;

    s[1] = _mm_sha256rnds2_epu32(s[1], s[0], words);
    s[0] = _mm_sha256rnds2_epu32(s[0], s[1], _mm_shuffle_epi32(words, 0x0e));
}

/* The four words after sixteen, which are oldest in w0. */
INLINE __m128i next_words(__m128i w0, __m128i w1, __m128i w2, __m128i w3)
{
    const __m128i middle = _mm_alignr_epi8(w3, w2, 4);

    return _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), middle), w3);
}

/* One block of each message, whose words are numbers. */
INLINE void compress(states *to, __m128i w[LANES][4])
{
    const states in = *to;
    __m128i newest[LANES];

#pragma GCC unroll 4
    for (size_t i = 0; i < LANES; i++) {
        newest[i] = w[i][3];
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < 16; r++) {
#pragma GCC unroll 4
        for (size_t i = 0; i < LANES; i++) {
            const __m128i x = w[i][r & 3];

            rounds4(to, i, _mm_add_epi32(x, load(pye_sha256_k + 4 * r)));
            if (r < 12) { /* the words that take the place of these */
                newest[i] = next_words(x, w[i][(r + 1) & 3], w[i][(r + 2) & 3], newest[i]);
                w[i][r & 3] = newest[i];
                /* Or the compiler keeps it in a register that another message needs. */
                __asm__("" : "+m"(w[i][r & 3]));
            }
        }
    }
    *to = sum(*to, in);
}

INLINE void take_blocks(states *to, const uint8_t *const *data, size_t first, size_t num_blocks)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);

    for (size_t block = first; block < first + num_blocks; block++) {
        __m128i w[LANES][4];

#pragma GCC unroll 4
        for (size_t i = 0; i < LANES; i++) {
            const uint8_t *from = data[i] + block * PYE_SHA256_BLOCK_SIZE;

#pragma GCC unroll 4
            for (size_t q = 0; q < 4; q++) {
                w[i][q] = _mm_shuffle_epi8(load(from + 16 * q), swap);
                __asm__("" : "+m"(w[i][q]));
            }
        }
        compress(to, w);
    }
}

static void blocks(pye_sha256_lanes *lanes, const uint8_t *const *data, size_t num_blocks)
{
    states to = load_states(lanes);

    take_blocks(&to, data, 0, num_blocks);
    store_states(lanes, &to);
}

static void own(pye_sha256_lanes *lanes, const pye_sha256_words *words)
{
    states to = load_states(lanes);
    __m128i w[LANES][4];

    for (size_t q = 0; q < 4; q++) {
        __m128i column[LANES];

        transpose(column, load(words->w[4 * q]), load(words->w[4 * q + 1]),
                  load(words->w[4 * q + 2]), load(words->w[4 * q + 3]));
        for (size_t i = 0; i < LANES; i++) {
            w[i][q] = column[i];
        }
    }
    compress(&to, w);
    store_states(lanes, &to);
}

/* An expanded block, the same for each message. */
INLINE void take_column(states *to, const uint32_t *from)
{
    const states in = *to;

#pragma GCC unroll 16
    for (size_t r = 0; r < 16; r++) {
        const __m128i x = load(from + 4 * r);

#pragma GCC unroll 4
        for (size_t i = 0; i < LANES; i++) {
            rounds4(to, i, x);
        }
    }
    *to = sum(*to, in);
}

static void columns(pye_sha256_lanes *lanes, const pye_sha256_words *words,
                    const uint8_t *const *data, size_t num_blocks)
{
    const uint32_t *from = &words->w[0][0];
    states to = load_states(lanes);

    for (size_t i = 0; i < PYE_SHA256_MAX_LANES; i++) {
        take_column(&to, from + i * COLUMN);
        take_blocks(&to, data, i * num_blocks, num_blocks);
    }
    store_states(lanes, &to);
}

static void expand(pye_sha256_words *words)
{
    uint32_t *to = &words->w[0][0];
    __m128i w[PYE_SHA256_MAX_LANES][4];

    for (size_t q = 0; q < 4; q++) { /* all is read before anything is written */
        for (size_t first = 0; first < PYE_SHA256_MAX_LANES; first += 4) {
            __m128i column[4];

            transpose(column, load(words->w[4 * q] + first), load(words->w[4 * q + 1] + first),
                      load(words->w[4 * q + 2] + first), load(words->w[4 * q + 3] + first));
            for (size_t i = 0; i < 4; i++) {
                w[first + i][q] = column[i];
            }
        }
    }
    for (size_t first = 0; first < PYE_SHA256_MAX_LANES; first += 2) { /* as compress does */
        __m128i(*x)[4] = &w[first];

#pragma GCC unroll 16
        for (size_t r = 0; r < 16; r++) {
#pragma GCC unroll 2
            for (size_t i = 0; i < 2; i++) {
                const __m128i now = x[i][r & 3];

                store(to + (first + i) * COLUMN + 4 * r,
                      _mm_add_epi32(now, load(pye_sha256_k + 4 * r)));
                if (r < 12) {
                    x[i][r & 3] = next_words(now, x[i][(r + 1) & 3], x[i][(r + 2) & 3],
                                             x[i][(r + 3) & 3]);
                }
            }
        }
    }
}

const pye_sha256_lanes_code pye_sha256_lanes_shani = {"sha-ni", LANES, 3, blocks,
                                                      own,      columns, expand};
#else
typedef int pye_sha256_lanes_shani_is_for_x86; /* ISO C wants a declaration */
#endif
