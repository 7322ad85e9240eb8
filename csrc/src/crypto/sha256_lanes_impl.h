/* sha256_lanes_impl.h - SHA-256 in LANES lanes (FIPS 180-4, 6.2.2).
 *
 * The file that includes this defines: LANES, the vector type `word`, and splat, add, xor3, choose,
 * majority, ror, shr, load_word, store_word and load_rows (sixteen message words of every lane, as
 * numbers). */
#include "crypto/sha256_lanes.h"

#define INLINE static inline __attribute__((always_inline))

INLINE word small0(word x)
{
    return xor3(ror(x, 7), ror(x, 18), shr(x, 3));
}

INLINE word small1(word x)
{
    return xor3(ror(x, 17), ror(x, 19), shr(x, 10));
}

INLINE word big0(word x)
{
    return xor3(ror(x, 2), ror(x, 13), ror(x, 22));
}

INLINE word big1(word x)
{
    return xor3(ror(x, 6), ror(x, 11), ror(x, 25));
}

/* The message word that takes the place of w[i]. */
#define NEXT(w, i)                                                                                 \
    (w[i] = add(add(w[i], small0(w[((i) + 1) & 15])),                                              \
                add(w[((i) + 9) & 15], small1(w[((i) + 14) & 15]))))

/* One round; `x` is the message word with its constant. */
#define ROUND(a, b, c, d, e, f, g, h, x)                                                           \
    do {                                                                                           \
        word t = add(add(h, x), choose(e, f, g));                                                  \
                                                                                                   \
        t = add(t, big1(e));                                                                       \
        d = add(d, t);                                                                             \
        h = add(t, add(majority(a, b, c), big0(a)));                                               \
    } while (0)

#define ROUNDS16(X)                                                                                \
    do {                                                                                           \
        ROUND(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], X(0));                               \
        ROUND(s[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], X(1));                               \
        ROUND(s[6], s[7], s[0], s[1], s[2], s[3], s[4], s[5], X(2));                               \
        ROUND(s[5], s[6], s[7], s[0], s[1], s[2], s[3], s[4], X(3));                               \
        ROUND(s[4], s[5], s[6], s[7], s[0], s[1], s[2], s[3], X(4));                               \
        ROUND(s[3], s[4], s[5], s[6], s[7], s[0], s[1], s[2], X(5));                               \
        ROUND(s[2], s[3], s[4], s[5], s[6], s[7], s[0], s[1], X(6));                               \
        ROUND(s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[0], X(7));                               \
        ROUND(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], X(8));                               \
        ROUND(s[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], X(9));                               \
        ROUND(s[6], s[7], s[0], s[1], s[2], s[3], s[4], s[5], X(10));                              \
        ROUND(s[5], s[6], s[7], s[0], s[1], s[2], s[3], s[4], X(11));                              \
        ROUND(s[4], s[5], s[6], s[7], s[0], s[1], s[2], s[3], X(12));                              \
        ROUND(s[3], s[4], s[5], s[6], s[7], s[0], s[1], s[2], X(13));                              \
        ROUND(s[2], s[3], s[4], s[5], s[6], s[7], s[0], s[1], X(14));                              \
        ROUND(s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[0], X(15));                              \
    } while (0)

#define FIRST(i) add(w[i], splat(pye_sha256_k[i]))
#define LATER(i) add(NEXT(w, i), splat(pye_sha256_k[r + (i)]))
#define SHARED(i) splat(words->w[r + (i)][column])

INLINE void load_state(word s[8], const pye_sha256_lanes *state)
{
    for (size_t i = 0; i < 8; i++) {
        s[i] = load_word(state->h[i]);
    }
}

INLINE void add_state(pye_sha256_lanes *state, const word s[8])
{
    for (size_t i = 0; i < 8; i++) {
        store_word(state->h[i], add(s[i], load_word(state->h[i])));
    }
}

INLINE void compress(pye_sha256_lanes *state, word w[16])
{
    word s[8];

    load_state(s, state);
    ROUNDS16(FIRST);
#pragma GCC unroll 1
    for (size_t r = 16; r < 64; r += 16) {
        ROUNDS16(LATER);
    }
    add_state(state, s);
}

INLINE void take_blocks(pye_sha256_lanes *state, const uint8_t *const *data, size_t first,
                        size_t num_blocks)
{
    word w[16];

    for (size_t block = first; block < first + num_blocks; block++) {
        load_rows(w, data, block * PYE_SHA256_BLOCK_SIZE);
        compress(state, w);
    }
}

static void blocks(pye_sha256_lanes *state, const uint8_t *const *data, size_t num_blocks)
{
    take_blocks(state, data, 0, num_blocks);
}

static void own(pye_sha256_lanes *state, const pye_sha256_words *words)
{
    word w[16];

    for (size_t i = 0; i < 16; i++) {
        w[i] = load_word(words->w[i]);
    }
    compress(state, w);
}

INLINE void take_column(pye_sha256_lanes *state, const pye_sha256_words *words, uint32_t column)
{
    word s[8];

    load_state(s, state);
#pragma GCC unroll 1
    for (size_t r = 0; r < 64; r += 16) {
        ROUNDS16(SHARED);
    }
    add_state(state, s);
}

static void columns(pye_sha256_lanes *state, const pye_sha256_words *words,
                    const uint8_t *const *data, size_t num_blocks)
{
    for (uint32_t i = 0; i < PYE_SHA256_MAX_LANES; i++) {
        take_column(state, words, i);
        take_blocks(state, data, i * num_blocks, num_blocks);
    }
}

static void expand(pye_sha256_words *words)
{
    word w[16];

    for (size_t first = 0; first < PYE_SHA256_MAX_LANES; first += LANES) {
        for (size_t i = 0; i < 16; i++) {
            w[i] = load_word(words->w[i] + first);
            store_word(words->w[i] + first, add(w[i], splat(pye_sha256_k[i])));
        }
#pragma GCC unroll 1
        for (size_t r = 16; r < 64; r += 16) {
#pragma GCC unroll 16
            for (size_t i = 0; i < 16; i++) {
                store_word(words->w[r + i] + first, add(NEXT(w, i), splat(pye_sha256_k[r + i])));
            }
        }
    }
}
