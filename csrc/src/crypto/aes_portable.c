/* aes_portable.c - AES encryption, bit-sliced: slice i holds bit i of every byte of the blocks.
 *
 * The order of the bits in a 64-bit lane, from the top: row (2 bits), column (2), block (2). Rows
 * are thus groups of 16 bits, which makes ShiftRows shifts under masks and MixColumns rotations by
 * 16 and 32. Two lanes are worked on at once; compilers turn the pair into a vector register. */
#include "crypto/aes_portable.h"

#include "pyenclave/base.h"

#include <string.h>

typedef uint64_t slice __attribute__((vector_size(16)));

#define LANES 2
#define BOTH(x) ((slice){(x), (x)})

/* The S-box of FIPS 197 as a circuit of 115 gates: Boyar and Peralta, "A depth-16 circuit for the
 * AES S-box" (2011), figures 5 to 7, with their names. u0 is the most significant bit. */
static inline void sub_bytes(slice q[8])
{
    const slice x0 = q[7], x1 = q[6], x2 = q[5], x3 = q[4];
    const slice x4 = q[3], x5 = q[2], x6 = q[1], x7 = q[0];

    /* top linear layer */
    const slice y14 = x3 ^ x5, y13 = x0 ^ x6, y9 = x0 ^ x3, y8 = x0 ^ x5;
    const slice t0 = x1 ^ x2, y1 = t0 ^ x7, y4 = y1 ^ x3, y12 = y13 ^ y14;
    const slice y2 = y1 ^ x0, y5 = y1 ^ x6, y3 = y5 ^ y8, t1 = x4 ^ y12;
    const slice y15 = t1 ^ x5, y20 = t1 ^ x1, y6 = y15 ^ x7, y10 = y15 ^ t0;
    const slice y11 = y20 ^ y9, y7 = x7 ^ y11, y17 = y10 ^ y11, y19 = y10 ^ y8;
    const slice y16 = t0 ^ y11, y21 = y13 ^ y16, y18 = x0 ^ y16;

    /* inversion in GF(2^8) */
    const slice t2 = y12 & y15, t3 = y3 & y6, t4 = t3 ^ t2, t5 = y4 & x7, t6 = t5 ^ t2;
    const slice t7 = y13 & y16, t8 = y5 & y1, t9 = t8 ^ t7, t10 = y2 & y7, t11 = t10 ^ t7;
    const slice t12 = y9 & y11, t13 = y14 & y17, t14 = t13 ^ t12, t15 = y8 & y10;
    const slice t16 = t15 ^ t12, t17 = t4 ^ t14, t18 = t6 ^ t16, t19 = t9 ^ t14;
    const slice t20 = t11 ^ t16, t21 = t17 ^ y20, t22 = t18 ^ y19, t23 = t19 ^ y21;
    const slice t24 = t20 ^ y18;
    const slice t25 = t21 ^ t22, t26 = t21 & t23, t27 = t24 ^ t26, t28 = t25 & t27;
    const slice t29 = t28 ^ t22, t30 = t23 ^ t24, t31 = t22 ^ t26, t32 = t31 & t30;
    const slice t33 = t32 ^ t24, t34 = t23 ^ t33, t35 = t27 ^ t33, t36 = t24 & t35;
    const slice t37 = t36 ^ t34, t38 = t27 ^ t36, t39 = t29 & t38, t40 = t25 ^ t39;
    const slice t41 = t40 ^ t37, t42 = t29 ^ t33, t43 = t29 ^ t40, t44 = t33 ^ t37;
    const slice t45 = t42 ^ t41;
    const slice z0 = t44 & y15, z1 = t37 & y6, z2 = t33 & x7, z3 = t43 & y16, z4 = t40 & y1;
    const slice z5 = t29 & y7, z6 = t42 & y11, z7 = t45 & y17, z8 = t41 & y10, z9 = t44 & y12;
    const slice z10 = t37 & y3, z11 = t33 & y4, z12 = t43 & y13, z13 = t40 & y5;
    const slice z14 = t29 & y2, z15 = t42 & y9, z16 = t45 & y14, z17 = t41 & y8;

    /* bottom linear layer */
    const slice t46 = z15 ^ z16, t47 = z10 ^ z11, t48 = z5 ^ z13, t49 = z9 ^ z10;
    const slice t50 = z2 ^ z12, t51 = z2 ^ z5, t52 = z7 ^ z8, t53 = z0 ^ z3, t54 = z6 ^ z7;
    const slice t55 = z16 ^ z17, t56 = z12 ^ t48, t57 = t50 ^ t53, t58 = z4 ^ t46;
    const slice t59 = z3 ^ t54, t60 = t46 ^ t57, t61 = z14 ^ t57, t62 = t52 ^ t58;
    const slice t63 = t49 ^ t58, t64 = z4 ^ t59, t65 = t61 ^ t62, t66 = z1 ^ t63;
    const slice t67 = t64 ^ t65, s3 = t53 ^ t66;

    q[7] = t59 ^ t63;
    q[6] = t64 ^ ~s3;
    q[5] = t55 ^ ~t67;
    q[4] = s3;
    q[3] = t51 ^ t66;
    q[2] = t47 ^ t65;
    q[1] = t56 ^ ~t62;
    q[0] = t48 ^ ~t60;
}

static inline void shift_rows(slice q[8])
{
    for (int i = 0; i < 8; i++) {
        const slice x = q[i];

        q[i] = (x & 0x000000000000ffff) | ((x & 0x00000000fff00000) >> 4) |
               ((x & 0x00000000000f0000) << 12) | ((x & 0x0000ff0000000000) >> 8) |
               ((x & 0x000000ff00000000) << 8) | ((x & BOTH(0xf000000000000000)) >> 12) |
               ((x & 0x0fff000000000000) << 4);
    }
}

static inline slice rotate(slice x, int bits)
{
    return (x >> bits) | (x << (64 - bits));
}

static inline void mix_columns(slice q[8])
{
    slice r[8];
    slice s[8];

    for (int i = 0; i < 8; i++) {
        r[i] = rotate(q[i], 16);
        s[i] = q[i] ^ r[i]; /* this row and the next: what doubling applies to */
    }
    const slice top = s[7]; /* its reduction by x^8 = x^4 + x^3 + x + 1 */
    slice previous = top;
    for (int i = 0; i < 8; i++) {
        const slice own = s[i];

        q[i] = previous ^ r[i] ^ rotate(own, 32);
        if (i == 1 || i == 3 || i == 4) {
            q[i] ^= top;
        }
        previous = own;
    }
}

static inline void add_key(slice q[8], const uint64_t key[8])
{
    for (int i = 0; i < 8; i++) {
        q[i] ^= BOTH(key[i]);
    }
}

#define EXCHANGE(mask, shift, a, b)                                                                \
    do {                                                                                           \
        const slice t_ = ((b) ^ ((a) >> (shift))) & (mask);                                        \
        (b) ^= t_;                                                                                 \
        (a) ^= t_ << (shift);                                                                      \
    } while (0)

/* transpose turns words of bytes into slices of bits, and back: it is its own inverse. */
static inline void transpose(slice q[8])
{
    for (int i = 0; i < 8; i += 2) {
        EXCHANGE(0x5555555555555555, 1, q[i], q[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        EXCHANGE(0x3333333333333333, 2, q[i], q[i + 2]);
        EXCHANGE(0x3333333333333333, 2, q[i + 1], q[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        EXCHANGE(0x0f0f0f0f0f0f0f0f, 4, q[i], q[i + 4]);
    }
}

static inline uint32_t load_le32(const uint8_t *p)
{
    return (uint32_t)p[0] | ((uint32_t)p[1] << 8) | ((uint32_t)p[2] << 16) | ((uint32_t)p[3] << 24);
}

static inline void store_le32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)x;
    p[1] = (uint8_t)(x >> 8);
    p[2] = (uint8_t)(x >> 16);
    p[3] = (uint8_t)(x >> 24);
}

/* spread moves the four bytes of a column (one a row) to the low bytes of the four rows. */
static inline uint64_t spread(uint32_t x)
{
    uint64_t y = x;

    y = (y | (y << 16)) & 0x0000ffff0000ffff;
    return (y | (y << 8)) & 0x00ff00ff00ff00ff;
}

static inline uint32_t gather(uint64_t y)
{
    y &= 0x00ff00ff00ff00ff;
    y = (y | (y >> 8)) & 0x0000ffff0000ffff;
    return (uint32_t)(y | (y >> 16));
}

static inline void load_block(uint64_t *low, uint64_t *high, const uint8_t in[16])
{
    *low = spread(load_le32(in)) | (spread(load_le32(in + 8)) << 8);
    *high = spread(load_le32(in + 4)) | (spread(load_le32(in + 12)) << 8);
}

static inline void store_block(uint8_t out[16], uint64_t low, uint64_t high)
{
    store_le32(out, gather(low));
    store_le32(out + 4, gather(high));
    store_le32(out + 8, gather(low >> 8));
    store_le32(out + 12, gather(high >> 8));
}

static inline void load_blocks(slice q[8], const uint8_t *in)
{
    for (int lane = 0; lane < LANES; lane++) {
        for (int i = 0; i < 4; i++) {
            uint64_t low;
            uint64_t high;

            load_block(&low, &high, in + 64 * lane + 16 * i);
            q[i][lane] = low;
            q[i + 4][lane] = high;
        }
    }
    transpose(q);
}

void aes_portable_encrypt(const aes_portable_key *key, uint8_t out[AES_PORTABLE_BLOCKS * 16],
                          const uint8_t in[AES_PORTABLE_BLOCKS * 16])
{
    slice q[8];

    load_blocks(q, in);
    add_key(q, key->slices[0]);
    for (uint32_t round = 1; round < key->rounds; round++) {
        sub_bytes(q);
        shift_rows(q);
        mix_columns(q);
        add_key(q, key->slices[round]);
    }
    sub_bytes(q);
    shift_rows(q);
    add_key(q, key->slices[key->rounds]);
    transpose(q);
    for (int lane = 0; lane < LANES; lane++) {
        for (int i = 0; i < 4; i++) {
            store_block(out + 64 * lane + 16 * i, q[i][lane], q[i + 4][lane]);
        }
    }
    pye_wipe(q, sizeof(q));
}

static uint32_t sub_word(uint32_t word)
{
    slice q[8] = {{word, 0}};

    transpose(q);
    sub_bytes(q);
    transpose(q);
    const uint32_t result = (uint32_t)q[0][0];
    pye_wipe(q, sizeof(q));
    return result;
}

void aes_portable_init(aes_portable_key *key, const uint8_t *secret, size_t secret_len)
{
    const size_t words = secret_len / 4;
    uint32_t w[60];
    uint8_t blocks[AES_PORTABLE_BLOCKS * 16];
    slice q[8];
    uint32_t constant = 1;

    key->rounds = (uint32_t)words + 6;
    const size_t total = 4 * ((size_t)key->rounds + 1);
    for (size_t i = 0; i < words; i++) {
        w[i] = load_le32(secret + 4 * i);
    }
    for (size_t i = words; i < total; i++) {
        uint32_t t = w[i - 1];

        if (i % words == 0) {
            t = sub_word((t >> 8) | (t << 24)) ^ constant;
            constant = (constant << 1) ^ ((constant >> 7) * 0x11b);
        } else if (words > 6 && i % words == 4) {
            t = sub_word(t);
        }
        w[i] = w[i - words] ^ t;
    }
    for (size_t round = 0; round <= key->rounds; round++) {
        for (size_t i = 0; i < sizeof(blocks) / 4; i++) {
            store_le32(blocks + 4 * i, w[4 * round + i % 4]);
        }
        load_blocks(q, blocks);
        for (int i = 0; i < 8; i++) {
            key->slices[round][i] = q[i][0];
        }
    }
    pye_wipe(w, sizeof(w));
    pye_wipe(blocks, sizeof(blocks));
    pye_wipe(q, sizeof(q));
}
