/* ghash_portable.c - GHASH by integer multiplications.
 *
 * GCM numbers the bits of a block from the left. Read as a little-endian integer after reversing
 * its bytes, a block is the bit-reflected polynomial. The product of two reflected polynomials is
 * the reflected product shifted by one, which is put right once, in the key: H is multiplied by x
 * beforehand (Gueron and Kounavis, "Intel carry-less multiplication and its usage for computing
 * the GCM mode", 2014).
 *
 * The multiplier of the CPU is assumed to take the same time for all operands, as it does on every
 * 64-bit CPU that this package supports. */
#include "crypto/ghash_portable.h"

__extension__ typedef unsigned __int128 wide;

static uint64_t load_be64(const uint8_t *p)
{
    uint64_t x = 0;

    for (int i = 0; i < 8; i++) {
        x = (x << 8) | p[i];
    }
    return x;
}

static void store_be64(uint8_t *p, uint64_t x)
{
    for (int i = 0; i < 8; i++) {
        p[i] = (uint8_t)(x >> (56 - 8 * i));
    }
}

/* clmul multiplies without carries. Every operand is cut into four numbers that have one bit in
 * four, so that the three free bits above each take the carries: with 15 such bits a column sums to
 * at most 15. The lowest four bits of `a`, which would make it 16, are done by masks. */
static wide clmul(uint64_t a, uint64_t b)
{
    uint64_t x[4];
    uint64_t y[4];
    wide result = 0;

    for (int i = 0; i < 4; i++) {
        x[i] = a & (UINT64_C(0x1111111111111110) << i);
        y[i] = b & (UINT64_C(0x1111111111111111) << i);
    }
    for (int i = 0; i < 4; i++) {
        wide column = 0;

        for (int j = 0; j < 4; j++) {
            column ^= (wide)x[j] * y[(i - j) & 3];
        }
        const uint64_t mask = UINT64_C(0x1111111111111111) << i;
        result |= column & (((wide)mask << 64) | mask);
    }
    for (int i = 0; i < 4; i++) {
        const uint64_t bit = UINT64_C(0) - ((a >> i) & 1);

        result ^= (wide)(b & bit) << i;
    }
    return result;
}

void ghash_portable_init(ghash_portable_key *key, const uint8_t h[16])
{
    const uint64_t high = load_be64(h);
    const uint64_t low = load_be64(h + 8);
    const uint64_t carry = UINT64_C(0) - (high >> 63);

    key->high = ((high << 1) | (low >> 63)) ^ (carry & UINT64_C(0xc200000000000000));
    key->low = (low << 1) ^ (carry & 1);
}

void ghash_portable_block(ghash_portable_state *state, const ghash_portable_key *key,
                          const uint8_t block[16])
{
    const uint64_t high = state->high ^ load_be64(block);
    const uint64_t low = state->low ^ load_be64(block + 8);

    /* Karatsuba: three multiplications in place of four */
    const wide p = clmul(low, key->low);
    const wide q = clmul(high, key->high);
    const wide m = clmul(low ^ high, key->low ^ key->high) ^ p ^ q;
    uint64_t w0 = (uint64_t)p;
    uint64_t w1 = (uint64_t)(p >> 64) ^ (uint64_t)m;
    uint64_t w2 = (uint64_t)q ^ (uint64_t)(m >> 64);
    uint64_t w3 = (uint64_t)(q >> 64);

    /* The lower half, a word at a time, is folded into the upper one: x^128 = x^7 + x^2 + x + 1. */
    w1 ^= (w0 << 63) ^ (w0 << 62) ^ (w0 << 57);
    w2 ^= w0 ^ (w0 >> 1) ^ (w0 >> 2) ^ (w0 >> 7);
    w2 ^= (w1 << 63) ^ (w1 << 62) ^ (w1 << 57);
    w3 ^= w1 ^ (w1 >> 1) ^ (w1 >> 2) ^ (w1 >> 7);
    state->low = w2;
    state->high = w3;
}

void ghash_portable_get(uint8_t out[16], const ghash_portable_state *state)
{
    store_be64(out, state->high);
    store_be64(out + 8, state->low);
}
