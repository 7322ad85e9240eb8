/* gcm_vaes512.h - 512-bit pieces that messages and pages share. For gcm_vaes512*.c only. */
#ifndef PYE_SRC_CRYPTO_GCM_VAES512_H
#define PYE_SRC_CRYPTO_GCM_VAES512_H

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmul")
#include <immintrin.h>

#include "crypto/gcm_x86.h"

typedef __m512i x512;

/* Vectors of a batch: 8 × 64 bytes. AES wants 8 (latency over throughput), registers allow no
 * more. */
#define WIDTH 8
#define UNROLL _Pragma("GCC unroll 16")

#define PIN512(x) __asm__ volatile("" : "+v"(x))

/* Sums of products over which one reduction is made. */
typedef struct {
    x512 low;
    x512 high;
    x512 middle;
} product;

INLINE x512 load512(const void *p)
{
    return _mm512_loadu_si512(p);
}

INLINE x512 broadcast512(const uint8_t block[16])
{
    return _mm512_broadcast_i32x4(load128(block));
}

INLINE x512 reverse_mask(void)
{
    return _mm512_broadcast_i32x4(
        _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

INLINE product no_product(void)
{
    return (product){_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
}

/* multiply_add adds four reversed blocks times powers[index] … powers[index + 3]. */
INLINE void multiply_add(product *sum, const gcm_wide_key *k, x512 x, size_t index)
{
    const x512 power = load512(k->powers[index]);
    const x512 half = load512(k->halves[index]);
    const x512 folded = _mm512_xor_si512(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x4e));

    sum->low = _mm512_xor_si512(sum->low, _mm512_clmulepi64_epi128(x, power, 0x00));
    sum->high = _mm512_xor_si512(sum->high, _mm512_clmulepi64_epi128(x, power, 0x11));
    sum->middle = _mm512_xor_si512(sum->middle, _mm512_clmulepi64_epi128(folded, half, 0x00));
}

/* multiply_add_pair adds eight, with three-way XORs. */
INLINE void multiply_add_pair(product *sum, const gcm_wide_key *k, x512 x, x512 y, size_t index)
{
    const x512 p = load512(k->powers[index]);
    const x512 q = load512(k->powers[index + 4]);
    const x512 x_folded = _mm512_xor_si512(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x4e));
    const x512 y_folded = _mm512_xor_si512(y, _mm512_shuffle_epi32(y, (_MM_PERM_ENUM)0x4e));

    sum->low = _mm512_ternarylogic_epi64(sum->low, _mm512_clmulepi64_epi128(x, p, 0x00),
                                         _mm512_clmulepi64_epi128(y, q, 0x00), 0x96);
    sum->high = _mm512_ternarylogic_epi64(sum->high, _mm512_clmulepi64_epi128(x, p, 0x11),
                                          _mm512_clmulepi64_epi128(y, q, 0x11), 0x96);
    sum->middle = _mm512_ternarylogic_epi64(
        sum->middle, _mm512_clmulepi64_epi128(x_folded, load512(k->halves[index]), 0x00),
        _mm512_clmulepi64_epi128(y_folded, load512(k->halves[index + 4]), 0x00), 0x96);
}

/* hash_pair adds vectors 2 i and 2 i + 1 of a batch that begins at powers[index]. */
INLINE void hash_pair(product *sum, const gcm_wide_key *k, const x512 *c, size_t i,
                      size_t index, x512 reverse)
{
    multiply_add_pair(sum, k, _mm512_shuffle_epi8(c[2 * i], reverse),
                      _mm512_shuffle_epi8(c[2 * i + 1], reverse), index + 8 * i);
}

/* run_rounds does rounds `first` … `rounds` - 1 of AES on a batch and, one beside the other for
 * they use different ports, hashes the ciphertext `c` into `sum` (NULL: nothing to hash). `mask`
 * (or NULL) is one more block to encrypt. */
INLINE void run_rounds(const gcm_wide_key *k, x512 s[WIDTH], const uint32_t first,
                       const uint32_t rounds, x128 *mask, product *sum, const x512 c[WIDTH],
                       size_t index, x512 reverse)
{
    UNROLL for (uint32_t r = first; r < rounds; r++) {
        const x512 key = broadcast512(k->round_keys[r]);

        UNROLL for (int i = 0; i < WIDTH; i++) {
            s[i] = _mm512_aesenc_epi128(s[i], key);
        }
        if (mask != NULL) {
            *mask = _mm_aesenc_si128(*mask, _mm512_castsi512_si128(key));
        }
        if (sum != NULL && r % 2 == 1 && (r - 3) / 2 < WIDTH / 2) {
            hash_pair(sum, k, c, (r - 3) / 2, index, reverse);
        }
    }
}

INLINE x128 fold512(x512 x)
{
    const __m256i y = _mm256_xor_si256(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));

    return _mm_xor_si128(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

INLINE x128 reduce_product(const product *p)
{
    const x128 low = fold512(p->low);
    const x128 high = fold512(p->high);
    const x128 middle = _mm_ternarylogic_epi64(fold512(p->middle), low, high, 0x96);

    return reduce128(_mm_xor_si128(low, _mm_slli_si128(middle, 8)),
                     _mm_xor_si128(high, _mm_srli_si128(middle, 8)));
}

/* clear_registers leaves no key, key stream or plaintext behind; VZEROALL ends at zmm15. */
INLINE void clear_registers(void)
{
    __asm__ volatile(
        "vpxorq %%xmm16, %%xmm16, %%xmm16\n\tvpxorq %%xmm17, %%xmm17, %%xmm17\n\t"
        "vpxorq %%xmm18, %%xmm18, %%xmm18\n\tvpxorq %%xmm19, %%xmm19, %%xmm19\n\t"
        "vpxorq %%xmm20, %%xmm20, %%xmm20\n\tvpxorq %%xmm21, %%xmm21, %%xmm21\n\t"
        "vpxorq %%xmm22, %%xmm22, %%xmm22\n\tvpxorq %%xmm23, %%xmm23, %%xmm23\n\t"
        "vpxorq %%xmm24, %%xmm24, %%xmm24\n\tvpxorq %%xmm25, %%xmm25, %%xmm25\n\t"
        "vpxorq %%xmm26, %%xmm26, %%xmm26\n\tvpxorq %%xmm27, %%xmm27, %%xmm27\n\t"
        "vpxorq %%xmm28, %%xmm28, %%xmm28\n\tvpxorq %%xmm29, %%xmm29, %%xmm29\n\t"
        "vpxorq %%xmm30, %%xmm30, %%xmm30\n\tvpxorq %%xmm31, %%xmm31, %%xmm31\n\t"
        "vzeroall"
        :
        :
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
          "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",
          "xmm28", "xmm29", "xmm30", "xmm31");
}

void pye_gcm_vaes512_seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream);
void pye_gcm_vaes512_open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream);

#endif
