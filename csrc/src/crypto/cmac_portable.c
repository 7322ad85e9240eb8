/* cmac_portable.c - chained AES-128 in plain C, without tables (FIPS 197).
 *
 * SubBytes is the boolean circuit of Boyar and Peralta ("A depth-16 circuit for the AES S-box",
 * IACR ePrint 2011/332, the 115-gate form), run on the sixteen bytes at once: bit i of every byte
 * stands in one word. So no address and no branch depends on a key or on data. */
#include "crypto/cmac.h"

#include <string.h>

static uint64_t load64(const uint8_t *p)
{
    uint64_t x;

    memcpy(&x, p, sizeof(x)); /* any byte order: each byte is treated alike */
    return x;
}

/* Transpose an 8x8 matrix of bits; its own inverse (Warren, Hacker's Delight, 7-3). */
static uint64_t transpose(uint64_t x)
{
    uint64_t t;

    t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaULL;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000cccc0000ccccULL;
    x ^= t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ULL;
    return x ^ t ^ (t << 28);
}

/* The S-box on bit planes; x[0] holds the most significant bits. */
static void sbox_planes(uint32_t x[8])
{
    /* top linear layer */
    const uint32_t y14 = x[3] ^ x[5], y13 = x[0] ^ x[6], y9 = x[0] ^ x[3], y8 = x[0] ^ x[5];
    const uint32_t t0 = x[1] ^ x[2], y1 = t0 ^ x[7], y4 = y1 ^ x[3], y12 = y13 ^ y14;
    const uint32_t y2 = y1 ^ x[0], y5 = y1 ^ x[6], y3 = y5 ^ y8, t1 = x[4] ^ y12;
    const uint32_t y15 = t1 ^ x[5], y20 = t1 ^ x[1], y6 = y15 ^ x[7], y10 = y15 ^ t0;
    const uint32_t y11 = y20 ^ y9, y7 = x[7] ^ y11, y17 = y10 ^ y11, y19 = y10 ^ y8;
    const uint32_t y16 = t0 ^ y11, y21 = y13 ^ y16, y18 = x[0] ^ y16;
    /* inversion in GF(2^8) */
    const uint32_t t2 = y12 & y15, t4 = (y3 & y6) ^ t2, t6 = (y4 & x[7]) ^ t2;
    const uint32_t t7 = y13 & y16, t9 = (y5 & y1) ^ t7, t11 = (y2 & y7) ^ t7;
    const uint32_t t12 = y9 & y11, t14 = (y14 & y17) ^ t12, t16 = (y8 & y10) ^ t12;
    const uint32_t t21 = t4 ^ t14 ^ y20, t22 = t6 ^ t16 ^ y19;
    const uint32_t t23 = t9 ^ t14 ^ y21, t24 = t11 ^ t16 ^ y18;
    const uint32_t t25 = t21 ^ t22, t26 = t21 & t23, t27 = t24 ^ t26, t29 = (t25 & t27) ^ t22;
    const uint32_t t30 = t23 ^ t24, t31 = t22 ^ t26, t33 = (t31 & t30) ^ t24, t34 = t23 ^ t33;
    const uint32_t t35 = t27 ^ t33, t36 = t24 & t35, t37 = t36 ^ t34, t38 = t27 ^ t36;
    const uint32_t t40 = t25 ^ (t29 & t38), t41 = t40 ^ t37, t42 = t29 ^ t33, t43 = t29 ^ t40;
    const uint32_t t44 = t33 ^ t37, t45 = t42 ^ t41;
    const uint32_t z0 = t44 & y15, z1 = t37 & y6, z2 = t33 & x[7], z3 = t43 & y16;
    const uint32_t z4 = t40 & y1, z5 = t29 & y7, z6 = t42 & y11, z7 = t45 & y17;
    const uint32_t z8 = t41 & y10, z9 = t44 & y12, z10 = t37 & y3, z11 = t33 & y4;
    const uint32_t z12 = t43 & y13, z13 = t40 & y5, z14 = t29 & y2, z15 = t42 & y9;
    const uint32_t z16 = t45 & y14, z17 = t41 & y8;
    /* bottom linear layer, with the affine constant 0x63 as complements */
    const uint32_t t46 = z15 ^ z16, t48 = z5 ^ z13, t50 = z2 ^ z12, t53 = z0 ^ z3;
    const uint32_t t57 = t50 ^ t53, t58 = z4 ^ t46, t59 = z3 ^ z6 ^ z7, t60 = t46 ^ t57;
    const uint32_t t61 = z14 ^ t57, t62 = z7 ^ z8 ^ t58, t63 = z9 ^ z10 ^ t58, t64 = z4 ^ t59;
    const uint32_t t65 = t61 ^ t62, t66 = z1 ^ t63;

    x[0] = t59 ^ t63;
    x[3] = t53 ^ t66;
    x[1] = t64 ^ ~x[3];
    x[2] = z16 ^ z17 ^ ~(t64 ^ t65);
    x[4] = z2 ^ z5 ^ t66;
    x[5] = z10 ^ z11 ^ t65;
    x[6] = z12 ^ t48 ^ ~t62;
    x[7] = t48 ^ ~t60;
}

static void sub_bytes(uint8_t s[16])
{
    uint64_t half[2];
    uint32_t planes[8];

    half[0] = transpose(load64(s));
    half[1] = transpose(load64(s + 8));
    for (unsigned i = 0; i < 8; i++) {
        const unsigned shift = 8 * (7 - i);

        planes[i] = (uint32_t)(half[0] >> shift & 0xff) | (uint32_t)(half[1] >> shift & 0xff) << 8;
    }
    sbox_planes(planes);
    half[0] = half[1] = 0;
    for (unsigned i = 0; i < 8; i++) {
        const unsigned shift = 8 * (7 - i);

        half[0] |= (uint64_t)(planes[i] & 0xff) << shift;
        half[1] |= (uint64_t)(planes[i] >> 8 & 0xff) << shift;
    }
    half[0] = transpose(half[0]);
    half[1] = transpose(half[1]);
    memcpy(s, half, 16);
    pye_wipe(half, sizeof(half));
    pye_wipe(planes, sizeof(planes));
}

/* Multiplication by x in GF(2^8), without a branch (FIPS 197, 4.2.1). */
static uint8_t xtime(uint8_t a)
{
    return (uint8_t)((uint32_t)(a << 1) ^ (0x1bu & (0u - (uint32_t)(a >> 7))));
}

static void shift_rows(uint8_t s[16])
{
    uint8_t t[16];

    for (size_t i = 0; i < 16; i++) {
        t[i] = s[(i + 4 * (i % 4)) % 16];
    }
    memcpy(s, t, 16);
    pye_wipe(t, sizeof(t));
}

static void mix_columns(uint8_t s[16])
{
    for (size_t c = 0; c < 16; c += 4) {
        const uint8_t first = s[c];
        const uint8_t all = (uint8_t)(s[c] ^ s[c + 1] ^ s[c + 2] ^ s[c + 3]);

        s[c] ^= (uint8_t)(all ^ xtime((uint8_t)(s[c] ^ s[c + 1])));
        s[c + 1] ^= (uint8_t)(all ^ xtime((uint8_t)(s[c + 1] ^ s[c + 2])));
        s[c + 2] ^= (uint8_t)(all ^ xtime((uint8_t)(s[c + 2] ^ s[c + 3])));
        s[c + 3] ^= (uint8_t)(all ^ xtime((uint8_t)(s[c + 3] ^ first)));
    }
}

static void add_key(uint8_t s[16], const uint8_t key[16])
{
    for (size_t i = 0; i < 16; i++) {
        s[i] ^= key[i];
    }
}

void pye_cmac_expand_portable(uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], const uint8_t key[16])
{
    uint8_t word[16] = {0};
    uint8_t rcon = 1;

    memcpy(round_keys[0], key, 16);
    for (size_t r = 1; r < PYE_CMAC_ROUND_KEYS; r++) {
        const uint8_t *before = round_keys[r - 1];

        for (size_t i = 0; i < 4; i++) {
            word[i] = before[12 + (i + 1) % 4];
        }
        sub_bytes(word);
        word[0] ^= rcon;
        rcon = xtime(rcon);
        for (size_t i = 0; i < 16; i++) {
            round_keys[r][i] = (uint8_t)(before[i] ^ (i < 4 ? word[i] : round_keys[r][i - 4]));
        }
    }
    pye_wipe(word, sizeof(word));
}

void pye_cmac_chain_portable(const uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], uint8_t state[16],
                             const uint8_t *blocks, size_t num_blocks)
{
    for (size_t i = 0; i < num_blocks; i++) {
        add_key(state, blocks + 16 * i);
        add_key(state, round_keys[0]);
        for (size_t r = 1; r < 10; r++) {
            sub_bytes(state);
            shift_rows(state);
            mix_columns(state);
            add_key(state, round_keys[r]);
        }
        sub_bytes(state);
        shift_rows(state);
        add_key(state, round_keys[10]);
    }
}
