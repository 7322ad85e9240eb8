/* sha512_lanes_impl.h - SHA-384 of LANES pages of 4096 bytes at once, one a lane (FIPS 180-4).
 *
 * The file that includes this defines: LANES, PAGES_FUNCTION, the vector type `word`, and
 * splat, add, xor3, choose, majority, ror, shr, load_rows (eight message words of every lane, as
 * numbers) and store_word. The content of pages is not secret: nothing is wiped. */
#include "crypto/sha512_lanes.h"

#include <string.h>

#define BLOCKS_A_PAGE (PYE_LANES_PAGE / PYE_SHA512_BLOCK_SIZE)

static inline word small0(word x)
{
    return xor3(ror(x, 1), ror(x, 8), shr(x, 7));
}

static inline word small1(word x)
{
    return xor3(ror(x, 19), ror(x, 61), shr(x, 6));
}

static inline word big0(word x)
{
    return xor3(ror(x, 28), ror(x, 34), ror(x, 39));
}

static inline word big1(word x)
{
    return xor3(ror(x, 14), ror(x, 18), ror(x, 41));
}

/* The message word that takes the place of w[i]. */
#define NEXT(i)                                                                                    \
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
        ROUND(a, b, c, d, e, f, g, h, X(0));                                                       \
        ROUND(h, a, b, c, d, e, f, g, X(1));                                                       \
        ROUND(g, h, a, b, c, d, e, f, X(2));                                                       \
        ROUND(f, g, h, a, b, c, d, e, X(3));                                                       \
        ROUND(e, f, g, h, a, b, c, d, X(4));                                                       \
        ROUND(d, e, f, g, h, a, b, c, X(5));                                                       \
        ROUND(c, d, e, f, g, h, a, b, X(6));                                                       \
        ROUND(b, c, d, e, f, g, h, a, X(7));                                                       \
        ROUND(a, b, c, d, e, f, g, h, X(8));                                                       \
        ROUND(h, a, b, c, d, e, f, g, X(9));                                                       \
        ROUND(g, h, a, b, c, d, e, f, X(10));                                                      \
        ROUND(f, g, h, a, b, c, d, e, X(11));                                                      \
        ROUND(e, f, g, h, a, b, c, d, X(12));                                                      \
        ROUND(d, e, f, g, h, a, b, c, X(13));                                                      \
        ROUND(c, d, e, f, g, h, a, b, X(14));                                                      \
        ROUND(b, c, d, e, f, g, h, a, X(15));                                                      \
    } while (0)

#define FIRST(i) add(w[i], splat(pye_sha512_k[i]))
#define LATER(i) add(NEXT(i), splat(pye_sha512_k[r + (i)]))

static inline __attribute__((always_inline)) void compress(word s[8], word w[16])
{
    word a = s[0], b = s[1], c = s[2], d = s[3];
    word e = s[4], f = s[5], g = s[6], h = s[7];

    ROUNDS16(FIRST);
#pragma GCC unroll 1
    for (size_t r = 16; r < 80; r += 16) {
        ROUNDS16(LATER);
    }
    s[0] = add(s[0], a);
    s[1] = add(s[1], b);
    s[2] = add(s[2], c);
    s[3] = add(s[3], d);
    s[4] = add(s[4], e);
    s[5] = add(s[5], f);
    s[6] = add(s[6], g);
    s[7] = add(s[7], h);
}

void PAGES_FUNCTION(uint8_t *const out[LANES], const uint8_t *const pages[LANES])
{
    word s[8];
    word w[16];

    for (size_t i = 0; i < 8; i++) {
        s[i] = splat(pye_sha384_initial[i]);
    }
    for (size_t block = 0; block < BLOCKS_A_PAGE; block++) {
        const size_t at = block * PYE_SHA512_BLOCK_SIZE;

        load_rows(w, pages, at);
        load_rows(w + 8, pages, at + PYE_SHA512_BLOCK_SIZE / 2);
        compress(s, w);
    }
    /* The padding is the same for every page: a one bit, zeros and the length in bits. */
    w[0] = splat(0x8000000000000000u);
    for (size_t i = 1; i < 15; i++) {
        w[i] = splat(0);
    }
    w[15] = splat(8 * PYE_LANES_PAGE);
    compress(s, w);
    for (size_t i = 0; i < PYE_SHA384_SIZE / 8; i++) {
        uint64_t lanes[LANES];

        store_word(lanes, s[i]);
        for (size_t lane = 0; lane < LANES; lane++) {
            uint64_t x = __builtin_bswap64(lanes[lane]);

            memcpy(out[lane] + 8 * i, &x, sizeof(x));
        }
    }
}
