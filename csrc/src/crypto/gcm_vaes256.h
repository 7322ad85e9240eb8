/* gcm_vaes256.h - 256-bit pieces that messages and pages share. For gcm_vaes256*.c only.
 *
 * For CPUs with VAES and VPCLMULQDQ, but without AVX-512 (Zen 3, Alder Lake): sixteen registers, no
 * masks, no three-way XOR. Eight vectors of AES state leave eight registers: three sums, a round
 * key, the byte order and three to work with. So ciphertext that is to be hashed waits in a copy on
 * the stack. */
#ifndef PYE_SRC_CRYPTO_GCM_VAES256_H
#define PYE_SRC_CRYPTO_GCM_VAES256_H

#pragma GCC target("avx2,vaes,vpclmulqdq,aes,pclmul")
#include <immintrin.h>

#include "crypto/gcm_x86.h"

typedef __m256i x256;

/* Vectors of a batch: 8 × 32 bytes, sixteen blocks. */
#define WIDTH 8
#define BATCH ((size_t)WIDTH * 32)
#define UNROLL _Pragma("GCC unroll 16")

#define PIN256(x) __asm__ volatile("" : "+x"(x))

/* KEEP makes the compiler finish a value here. It would put off all additions to a sum until the end,
 * and spill every product to the stack meanwhile. */
#define KEEP256(x) __asm__("" : "+x"(x))

/* Sums of products over which one reduction is made. */
typedef struct {
    x256 low;
    x256 high;
    x256 middle;
} product;

INLINE x256 load256(const void *p)
{
    return _mm256_loadu_si256(p);
}

INLINE void store256(void *p, x256 value)
{
    _mm256_storeu_si256(p, value);
}

INLINE x256 broadcast256(const uint8_t block[16])
{
    return _mm256_broadcastsi128_si256(load128(block));
}

/* widen gives a vector whose upper block is zero. */
INLINE x256 widen(x128 x)
{
    return _mm256_zextsi128_si256(x);
}

INLINE x256 reverse_mask(void)
{
    return _mm256_broadcastsi128_si256(
        _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

INLINE product no_product(void)
{
    return (product){_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
}

/* multiply_add adds two reversed blocks times powers[index] and powers[index + 1]. */
INLINE void multiply_add(product *sum, const gcm_wide_key *k, x256 x, size_t index)
{
    const x256 power = load256(k->powers[index]);
    const x256 half = load256(k->halves[index]);
    const x256 folded = _mm256_xor_si256(x, _mm256_shuffle_epi32(x, 0x4e));

    sum->low = _mm256_xor_si256(sum->low, _mm256_clmulepi64_epi128(x, power, 0x00));
    sum->high = _mm256_xor_si256(sum->high, _mm256_clmulepi64_epi128(x, power, 0x11));
    sum->middle = _mm256_xor_si256(sum->middle, _mm256_clmulepi64_epi128(folded, half, 0x00));
    KEEP256(sum->low);
    KEEP256(sum->high);
    KEEP256(sum->middle);
}

/* hash_vector adds vector `i` of a batch that begins at powers[index]. */
INLINE void hash_vector(product *sum, const gcm_wide_key *k, const uint8_t c[BATCH], size_t i,
                        size_t index, x256 reverse)
{
    multiply_add(sum, k, _mm256_shuffle_epi8(load256(c + 32 * i), reverse), index + 2 * i);
}

INLINE void hash_batch(product *sum, const gcm_wide_key *k, const uint8_t c[BATCH], size_t index,
                       x256 reverse)
{
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        hash_vector(sum, k, c, i, index, reverse);
    }
}

/* run_rounds does rounds 2 … `rounds` - 1 of AES on a batch and, one beside the other for they use
 * different ports, hashes the ciphertext `c` into `sum` (NULL: nothing to hash). `mask` (or NULL)
 * is one more block to encrypt. */
INLINE void run_rounds(const gcm_wide_key *k, x256 s[WIDTH], const uint32_t rounds, x128 *mask,
                       product *sum, const uint8_t c[BATCH], size_t index, x256 reverse)
{
    UNROLL for (uint32_t r = 2; r < rounds; r++) {
        const x256 key = broadcast256(k->round_keys[r]);

        UNROLL for (int i = 0; i < WIDTH; i++) {
            s[i] = _mm256_aesenc_epi128(s[i], key);
        }
        if (mask != NULL) {
            *mask = _mm_aesenc_si128(*mask, _mm256_castsi256_si128(key));
        }
        if (sum != NULL && r - 2 < WIDTH) {
            hash_vector(sum, k, c, r - 2, index, reverse);
        }
    }
}

INLINE x128 fold256(x256 x)
{
    return _mm_xor_si128(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

INLINE x128 reduce_product(const product *p)
{
    const x128 low = fold256(p->low);
    const x128 high = fold256(p->high);
    const x128 middle = _mm_xor_si128(fold256(p->middle), _mm_xor_si128(low, high));

    return reduce128(_mm_xor_si128(low, _mm_slli_si128(middle, 8)),
                     _mm_xor_si128(high, _mm_srli_si128(middle, 8)));
}

void pye_gcm_vaes256_seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream);
void pye_gcm_vaes256_open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream);

#endif
