/* armv8.h - what the files for AArch64's cryptographic instructions share. Include it after their
 * target pragma: everything here is compiled for the instruction set of the including file. */
#ifndef PYE_SRC_CRYPTO_ARMV8_H
#define PYE_SRC_CRYPTO_ARMV8_H

#include "pyenclave/base.h"

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint8x16_t v128;

INLINE v128 load128(const void *p)
{
    return vld1q_u8(p);
}

INLINE void store128(void *p, v128 value)
{
    vst1q_u8(p, value);
}

/* sub_word is SubWord of FIPS 197: AESE with a zero key; ShiftRows changes nothing where every
 * column is the same word. */
INLINE uint32_t sub_word(uint32_t word)
{
    const v128 x = vaeseq_u8(vreinterpretq_u8_u32(vdupq_n_u32(word)), vdupq_n_u8(0));

    return vgetq_lane_u32(vreinterpretq_u32_u8(x), 0);
}

/* expand_key writes the round keys (FIPS 197, 5.2) of a key of 16 or 32 bytes and returns their
 * number less one. */
INLINE uint32_t expand_key(uint8_t round_keys[][16], const uint8_t *secret, size_t secret_len)
{
    const size_t words = secret_len / 4;
    const size_t rounds = words + 6;
    uint32_t w[4 * 15];
    uint32_t constant = 1;

    memcpy(w, secret, secret_len);
    for (size_t i = words; i < 4 * (rounds + 1); i++) {
        uint32_t t = w[i - 1];

        if (i % words == 0) {
            t = sub_word((t >> 8) | (t << 24)) ^ constant;
            constant = (constant << 1) ^ ((constant >> 7) * 0x11b);
        } else if (words > 6 && i % words == 4) {
            t = sub_word(t);
        }
        w[i] = w[i - words] ^ t;
    }
    memcpy(round_keys, w, 16 * (rounds + 1));
    pye_wipe(w, sizeof(w));
    return (uint32_t)rounds;
}

/* AESE adds the round key before the bytes are exchanged, so the last two keys belong to the last
 * round. AESE and AESMC stand side by side: many processors run such a pair as one. */
INLINE v128 encrypt128(const uint8_t *round_keys, uint32_t rounds, v128 block)
{
    for (uint32_t i = 0; i < rounds - 1; i++) {
        block = vaesmcq_u8(vaeseq_u8(block, load128(round_keys + 16 * i)));
    }
    block = vaeseq_u8(block, load128(round_keys + 16 * (rounds - 1)));
    return veorq_u8(block, load128(round_keys + 16 * rounds));
}

/* PIN keeps a loaded value in its register: the compiler may not load it a second time, from
 * memory that an attacker may have changed meanwhile. */
#define PIN128(x) __asm__ volatile("" : "+w"(x))

/* HIDE makes the compiler forget where `k` points to, so that it loads round keys when they are
 * needed; it would keep all of them in registers and spill data to the stack instead. */
#define HIDE(k) __asm__ volatile("" : "+r"(k))

#endif
