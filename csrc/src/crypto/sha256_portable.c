/* sha256_portable.c - SHA-256's block function in plain C (FIPS 180-4, 4.1.2 and 6.2.2). */
#include "crypto/sha256.h"

#if !defined(__clang__)
/* gcc undoes the order in which a round adds up, which is the one with the shortest chain. */
#pragma GCC optimize("no-tree-reassoc")
#endif

/* First 32 bits of the fractional parts of the cube roots of the first 64 primes (4.2.2). */
const uint32_t pye_sha256_k[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate(uint32_t x, unsigned n)
{
    return (x >> n) | (x << (32 - n));
}

static inline uint32_t load32(const uint8_t *p)
{
    return ((uint32_t)p[0] << 24) | ((uint32_t)p[1] << 16) | ((uint32_t)p[2] << 8) | p[3];
}

static inline uint32_t small0(uint32_t x)
{
    return rotate(x, 7) ^ rotate(x, 18) ^ (x >> 3);
}

static inline uint32_t small1(uint32_t x)
{
    return rotate(x, 17) ^ rotate(x, 19) ^ (x >> 10);
}

/* One round, and before it the message word that it needs. The working variables change places by
 * the order of the arguments; b_xor_c is what this round's majority takes over from the last. */
#define ROUND(a, b, c, d, e, f, g, h, i)                                                           \
    do {                                                                                           \
        uint32_t t;                                                                                \
                                                                                                   \
        if (r != 0) {                                                                              \
            w[i] += small0(w[((i) + 1) & 15]) + w[((i) + 9) & 15] + small1(w[((i) + 14) & 15]);    \
        }                                                                                          \
        t = h + pye_sha256_k[r + (i)] + w[i];                                                      \
        t += ((f ^ g) & e) ^ g;                                                                    \
        t += rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);                                         \
        d += t;                                                                                    \
        const uint32_t a_xor_b = a ^ b;                                                            \
        h = t + ((a_xor_b & b_xor_c) ^ b);                                                         \
        h += rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);                                         \
        b_xor_c = a_xor_b;                                                                         \
    } while (0)

void pye_sha256_blocks_portable(uint32_t h_out[8], const uint8_t *data, size_t num_blocks)
{
    uint32_t w[16];

    while (num_blocks-- != 0) {
        uint32_t a = h_out[0], b = h_out[1], c = h_out[2], d = h_out[3];
        uint32_t e = h_out[4], f = h_out[5], g = h_out[6], h = h_out[7];
        uint32_t b_xor_c = b ^ c;

        for (size_t i = 0; i < 16; i++) {
            w[i] = load32(data + 4 * i);
        }
        for (size_t r = 0; r < 64; r += 16) {
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
        data += PYE_SHA256_BLOCK_SIZE;
    }
    pye_wipe(w, sizeof(w));
}
