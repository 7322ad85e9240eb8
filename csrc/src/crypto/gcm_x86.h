/* gcm_x86.h - what the AES-NI and VAES files share. Include it after their target pragma and
 * <immintrin.h>: everything here is compiled for the instruction set of the including file. */
#ifndef PYE_SRC_CRYPTO_GCM_X86_H
#define PYE_SRC_CRYPTO_GCM_X86_H

#include "crypto/gcm_impl.h"

#define INLINE static inline __attribute__((always_inline))

typedef __m128i x128;

/* fetch_ahead asks for the lines of a piece of memory that will be read later. A page of a heap, or
 * of any large area, is a page of its own in the machine's memory, at whose end the processor's own
 * prefetchers stop: without this each page would begin by waiting for memory. */
INLINE void fetch_ahead(const uint8_t *from, size_t len)
{
#pragma GCC unroll 16
    for (size_t i = 0; i < len; i += 64) {
        _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
    }
}

INLINE x128 load128(const void *p)
{
    return _mm_loadu_si128((const x128 *)p);
}

INLINE void store128(void *p, x128 value)
{
    _mm_storeu_si128((x128 *)p, value);
}

INLINE x128 reverse128(x128 x)
{
    return _mm_shuffle_epi8(x,
                            _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

/* swap128 exchanges the halves. */
INLINE x128 swap128(x128 x)
{
    return _mm_shuffle_epi32(x, 0x4e);
}

/* reduce128 folds a product of 256 bits modulo x^128 + x^7 + x^2 + x + 1, bit-reflected, one
 * operand having been multiplied by x (ghash_portable.c says why). */
INLINE x128 reduce128(x128 low, x128 high)
{
    const x128 polynomial = _mm_set_epi64x(0, (long long)0xc200000000000000u);

    low = _mm_xor_si128(swap128(low), _mm_clmulepi64_si128(low, polynomial, 0x00));
    low = _mm_xor_si128(swap128(low), _mm_clmulepi64_si128(low, polynomial, 0x00));
    return _mm_xor_si128(low, high);
}

/* multiply128 gives the product of 256 bits. */
INLINE void multiply128(x128 a, x128 b, x128 *low, x128 *high)
{
    const x128 middle =
        _mm_xor_si128(_mm_clmulepi64_si128(a, b, 0x10), _mm_clmulepi64_si128(a, b, 0x01));

    *low = _mm_xor_si128(_mm_clmulepi64_si128(a, b, 0x00), _mm_slli_si128(middle, 8));
    *high = _mm_xor_si128(_mm_clmulepi64_si128(a, b, 0x11), _mm_srli_si128(middle, 8));
}

INLINE x128 times_x(x128 h)
{
    const x128 carry = _mm_shuffle_epi32(_mm_srai_epi32(h, 31), 0xff);
    const x128 polynomial = _mm_set_epi64x((long long)0xc200000000000000u, 1);
    const x128 shifted =
        _mm_or_si128(_mm_slli_epi64(h, 1), _mm_slli_si128(_mm_srli_epi64(h, 63), 8));

    return _mm_xor_si128(shifted, _mm_and_si128(carry, polynomial));
}

/* sub_word is SubWord of FIPS 197: AESENCLAST with a zero key, ShiftRows undone by giving every
 * column the same word. */
INLINE uint32_t sub_word(uint32_t word)
{
    const x128 x = _mm_set1_epi32((int)word);
    /* after ShiftRows of equal columns each column is the word again */
    return (uint32_t)_mm_cvtsi128_si32(_mm_aesenclast_si128(x, _mm_setzero_si128()));
}

/* expand_key writes the round keys (FIPS 197, 5.2) and returns their number less one. */
INLINE uint32_t expand_key(uint8_t round_keys[][16], const uint8_t *secret, size_t secret_len)
{
    const size_t words = secret_len / 4;
    const size_t rounds = words + 6;
    uint32_t w[4 * (GCM_MAX_ROUNDS + 1)];
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

INLINE x128 encrypt128(const uint8_t *round_keys, uint32_t rounds, x128 block)
{
    block = _mm_xor_si128(block, load128(round_keys));
    for (uint32_t i = 1; i < rounds; i++) {
        block = _mm_aesenc_si128(block, load128(round_keys + 16 * i));
    }
    return _mm_aesenclast_si128(block, load128(round_keys + 16 * rounds));
}

INLINE x128 length_block(size_t aad_len, size_t len)
{
    return _mm_set_epi64x((long long)((uint64_t)aad_len * 8), (long long)((uint64_t)len * 8));
}

/* make_tables fills in what the VAES code knows of a key beforehand, besides round keys and powers;
 * `h` is H reversed and times x. */
INLINE void make_tables(gcm_wide_key *k, x128 h)
{
    const x128 zero = _mm_setzero_si128();
    x128 low;
    x128 high;

    multiply128(length_block(GCM_HEADER_SIZE, GCM_PAGE_SIZE), h, &low, &high);
    store128(k->lengths[0], low);
    store128(k->lengths[1], high);

    /* The bytes of a block meet only by XOR in the first round. What a counter in bytes 14 and 15
     * adds to the round of a block with counter zero is thus the same for every IV. */
    const x128 white = load128(k->round_keys[0]);
    const x128 base = _mm_aesenc_si128(white, zero);
    for (int counter = 1; counter <= 257; counter++) {
        const x128 block =
            _mm_slli_si128(_mm_cvtsi32_si128((counter >> 8) | ((counter & 0xff) << 8)), 14);
        const x128 added =
            _mm_xor_si128(base, _mm_aesenc_si128(_mm_xor_si128(block, white), zero));
        store128(counter == 1 ? k->first_tag : k->first[counter - 2], added);
    }
    memcpy(k->wrap, k->first[252], 32);
    memcpy(k->wrap[3], k->first_tag, 16); /* wrap[2] is zero */
}

/* load_part reads `len` (0 … 15) bytes into a block filled with zeros. */
INLINE x128 load_part(const uint8_t *p, size_t len)
{
    uint8_t block[16] = {0};

    memcpy(block, p, len);
    const x128 x = load128(block);
    pye_wipe(block, sizeof(block));
    return x;
}

/* PIN keeps a loaded value in its register: the compiler may not load it a second time, from
 * memory that an attacker may have changed meanwhile. */
#define PIN128(x) __asm__ volatile("" : "+x"(x))

/* HIDE makes the compiler forget where `k` points to, so that it loads round keys when they are
 * needed; it would keep all of them in registers and spill data to the stack instead. */
#define HIDE(k) __asm__ volatile("" : "+r"(k))

#endif
