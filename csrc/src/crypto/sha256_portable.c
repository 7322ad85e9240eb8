/* sha256_portable.c - SHA-256's block function in plain C (FIPS 180-4, 4.1.2 and 6.2.2). */
#include "crypto/sha256.h"

#include <string.h>

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

#define ROUND(a, b, c, d, e, f, g, h, i)                                                           \
    do {                                                                                           \
        const uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +                   \
                            (((f ^ g) & e) ^ g) + k[i] + w[i];                                     \
        d += t1;                                                                                   \
        h = t1 + (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + (((a | b) & c) | (a & b));       \
    } while (0)

void pye_sha256_blocks_portable(uint32_t h_out[8], const uint8_t *data, size_t num_blocks)
{
    uint32_t w[16];
    uint32_t s[8];

    while (num_blocks-- != 0) {
        memcpy(s, h_out, sizeof(s));
        for (size_t i = 0; i < 16; i++) {
            w[i] = load32(data + 4 * i);
        }
        for (size_t r = 0; r < 64; r += 16) {
            const uint32_t *k = pye_sha256_k + r;

            if (r != 0) {
                for (size_t i = 0; i < 16; i++) {
                    w[i] += small0(w[(i + 1) & 15]) + w[(i + 9) & 15] + small1(w[(i + 14) & 15]);
                }
            }
            for (size_t i = 0; i < 16; i += 8) {
                ROUND(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], i);
                ROUND(s[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], i + 1);
                ROUND(s[6], s[7], s[0], s[1], s[2], s[3], s[4], s[5], i + 2);
                ROUND(s[5], s[6], s[7], s[0], s[1], s[2], s[3], s[4], i + 3);
                ROUND(s[4], s[5], s[6], s[7], s[0], s[1], s[2], s[3], i + 4);
                ROUND(s[3], s[4], s[5], s[6], s[7], s[0], s[1], s[2], i + 5);
                ROUND(s[2], s[3], s[4], s[5], s[6], s[7], s[0], s[1], i + 6);
                ROUND(s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[0], i + 7);
            }
        }
        for (size_t i = 0; i < 8; i++) {
            h_out[i] += s[i];
        }
        data += PYE_SHA256_BLOCK_SIZE;
    }
    pye_wipe(w, sizeof(w));
    pye_wipe(s, sizeof(s));
}
