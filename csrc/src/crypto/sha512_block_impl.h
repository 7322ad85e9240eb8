/* sha512_block_impl.h - the block function of SHA-384 and SHA-512 (FIPS 180-4, 4.1.3 and 6.4.2).
 *
 * The file that includes this names BLOCKS_FUNCTION and sets the instruction set. */
#include "crypto/sha512_lanes.h"

#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif

static inline uint64_t rotate(uint64_t x, unsigned n)
{
    return (x >> n) | (x << (64 - n));
}

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t x = 0;

    for (size_t i = 0; i < 8; i++) {
        x = (x << 8) | p[i];
    }
    return x;
}

static inline uint64_t small0(uint64_t x)
{
    return rotate(x, 1) ^ rotate(x, 8) ^ (x >> 7);
}

static inline uint64_t small1(uint64_t x)
{
    return rotate(x, 19) ^ rotate(x, 61) ^ (x >> 6);
}

/* One round, and before it the message word that it needs. The working variables change places by
 * the order of the arguments; b_xor_c is what this round's majority takes over from the last. */
#define ROUND(a, b, c, d, e, f, g, h, i)                                                           \
    do {                                                                                           \
        uint64_t t;                                                                                \
                                                                                                   \
        if (r != 0) {                                                                              \
            w[i] += small0(w[((i) + 1) & 15]) + w[((i) + 9) & 15] + small1(w[((i) + 14) & 15]);    \
        }                                                                                          \
        t = h + pye_sha512_k[r + (i)] + w[i];                                                              \
        t += ((f ^ g) & e) ^ g;                                                                    \
        t += rotate(e, 14) ^ rotate(e, 18) ^ rotate(e, 41);                                        \
        d += t;                                                                                    \
        const uint64_t a_xor_b = a ^ b;                                                            \
        h = t + ((a_xor_b & b_xor_c) ^ b);                                                         \
        h += rotate(a, 28) ^ rotate(a, 34) ^ rotate(a, 39);                                        \
        b_xor_c = a_xor_b;                                                                         \
    } while (0)

void BLOCKS_FUNCTION(uint64_t h_out[8], const uint8_t *data, size_t num_blocks)
{
    uint64_t w[16];

    while (num_blocks-- != 0) {
        uint64_t a = h_out[0], b = h_out[1], c = h_out[2], d = h_out[3];
        uint64_t e = h_out[4], f = h_out[5], g = h_out[6], h = h_out[7];
        uint64_t b_xor_c = b ^ c;

        for (size_t i = 0; i < 16; i++) {
            w[i] = load64(data + 8 * i);
        }
        for (size_t r = 0; r < 80; r += 16) {
            ROUND(a, b, c, d, e, f, g, h, 0);
            ROUND(h, a, b, c, d, e, f, g, 1);
            ROUND(g, h, a, b, c, d, e, f, 2);
            ROUND(f, g, h, a, b, c, d, e, 3);
            ROUND(e, f, g, h, a, b, c, d, 4);
            ROUND(d, e, f, g, h, a, b, c, 5);
            ROUND(c, d, e, f, g, h, a, b, 6);
            ROUND(b, c, d, e, f, g, h, a, 7);
            ROUND(a, b, c, d, e, f, g, h, 8);
            ROUND(h, a, b, c, d, e, f, g, 9);
            ROUND(g, h, a, b, c, d, e, f, 10);
            ROUND(f, g, h, a, b, c, d, e, 11);
            ROUND(e, f, g, h, a, b, c, d, 12);
            ROUND(d, e, f, g, h, a, b, c, 13);
            ROUND(c, d, e, f, g, h, a, b, 14);
            ROUND(b, c, d, e, f, g, h, a, 15);
        }
        h_out[0] += a;
        h_out[1] += b;
        h_out[2] += c;
        h_out[3] += d;
        h_out[4] += e;
        h_out[5] += f;
        h_out[6] += g;
        h_out[7] += h;
        data += PYE_SHA512_BLOCK_SIZE;
    }
    pye_wipe(w, sizeof(w));
}
