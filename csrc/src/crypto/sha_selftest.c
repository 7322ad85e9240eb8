/* sha_selftest.c - known answers for everything in hash.h, on each implementation. */
#include "base/check.h"
#include "crypto/cmac.h"
#include "crypto/sha256_lanes.h"
#include "crypto/sha512_lanes.h"

#include <string.h>

/* FIPS 180-4's example: two blocks after padding, so that the state is carried over. */
static const char message[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
static const uint8_t sha256_want[PYE_SHA256_SIZE] = {
    0x24, 0x8d, 0x6a, 0x61, 0xd2, 0x06, 0x38, 0xb8, 0xe5, 0xc0, 0x26, 0x93, 0x0c, 0x3e, 0x60, 0x39,
    0xa3, 0x3c, 0xe4, 0x59, 0x64, 0xff, 0x21, 0x67, 0xf6, 0xec, 0xed, 0xd4, 0x19, 0xdb, 0x06, 0xc1,
};
static const uint8_t sha384_want[PYE_SHA384_SIZE] = {
    0x33, 0x91, 0xfd, 0xdd, 0xfc, 0x8d, 0xc7, 0x39, 0x37, 0x07, 0xa6, 0x5b, 0x1b, 0x47, 0x09, 0x39,
    0x7c, 0xf8, 0xb1, 0xd1, 0x62, 0xaf, 0x05, 0xab, 0xfe, 0x8f, 0x45, 0x0d, 0xe5, 0xf3, 0x6b, 0xc6,
    0xb0, 0x45, 0x5a, 0x85, 0x20, 0xbc, 0x4e, 0x6f, 0x5f, 0xe9, 0x5b, 0x1f, 0xe3, 0xc8, 0x45, 0x2b,
};
/* RFC 5869, test case 3: empty salt and info. */
static const uint8_t hkdf_want[42] = {
    0x8d, 0xa4, 0xe7, 0x75, 0xa5, 0x63, 0xc1, 0x8f, 0x71, 0x5f, 0x80, 0x2a, 0x06, 0x3c,
    0x5a, 0x31, 0xb8, 0xa1, 0x1f, 0x5c, 0x5e, 0xe1, 0x87, 0x9e, 0xc3, 0x45, 0x4e, 0x5f,
    0x3c, 0x73, 0x8d, 0x2d, 0x9d, 0x20, 0x13, 0x95, 0xfa, 0xa4, 0xb6, 0x1a, 0x96, 0xc8,
};
/* RFC 4493, section 4: key, and L = AES(0). */
static const uint8_t cmac_key[16] = {
    0x2b, 0x7e, 0x15, 0x16, 0x28, 0xae, 0xd2, 0xa6, 0xab, 0xf7, 0x15, 0x88, 0x09, 0xcf, 0x4f, 0x3c,
};
static const uint8_t cmac_aes_of_zero[16] = {
    0x7d, 0xf7, 0x6b, 0x0c, 0x1a, 0xb8, 0x99, 0xb3, 0x3e, 0x42, 0xf0, 0x47, 0xb9, 0x1b, 0x54, 0x6f,
};
/* RFC 4493, example 1: the empty message. */
static const uint8_t cmac_want[PYE_CMAC_SIZE] = {
    0xbb, 0x1d, 0x69, 0x29, 0xe9, 0x59, 0x37, 0x28, 0x7f, 0xa3, 0x7d, 0x12, 0x9b, 0x75, 0x67, 0x46,
};

static int test_sha256(uint32_t variant)
{
    uint8_t out[PYE_SHA256_SIZE];
    pye_sha256_ctx ctx;

    pye_sha256_init(&ctx);
    ctx.variant = variant;
    pye_sha256_update(&ctx, message, sizeof(message) - 1);
    pye_sha256_final(&ctx, out);
    return memcmp(out, sha256_want, sizeof(out)) == 0;
}

#if defined(__x86_64__)
/* A message of its own for each lane: contiguous blocks, one of its own, and columns between more.
 * Lane i begins at block i. */
static int test_sha256_lanes(const pye_sha256_lanes_code *code)
{
    uint8_t data[2 * PYE_SHA256_MAX_LANES][PYE_SHA256_BLOCK_SIZE];
    const uint8_t *from[PYE_SHA256_MAX_LANES];
    pye_sha256_lanes state;
    pye_sha256_words words;
    int same = 1;

    for (size_t i = 0; i < 2 * PYE_SHA256_MAX_LANES; i++) {
        for (size_t j = 0; j < sizeof(data[i]); j++) {
            data[i][j] = (uint8_t)(i * 29 + j * 7);
        }
    }
    for (size_t i = 0; i < PYE_SHA256_MAX_LANES; i++) {
        from[i] = data[i];
        for (size_t j = 0; j < 8; j++) {
            state.h[j][i] = pye_sha256_k[i + j];
        }
        for (size_t j = 0; j < 16; j++) {
            uint32_t x;

            memcpy(&x, data[i] + 4 * j, sizeof(x));
            words.w[j][i] = __builtin_bswap32(x);
        }
    }
    code->blocks(&state, from, 2);
    code->own(&state, &words);
    code->expand(&words);
    code->columns(&state, &words, from, 1);
    for (size_t i = 0; i < code->lanes; i++) {
        uint32_t h[8];
        uint32_t lane[8];

        memcpy(h, pye_sha256_k + i, sizeof(h));
        pye_sha256_blocks_portable(h, data[i], 2);
        pye_sha256_blocks_portable(h, data[i], 1);
        for (size_t j = 0; j < PYE_SHA256_MAX_LANES; j++) {
            pye_sha256_blocks_portable(h, data[j], 1);
            pye_sha256_blocks_portable(h, data[i + j], 1);
        }
        for (size_t j = 0; j < 8; j++) {
            lane[j] = state.h[j][i];
        }
        same &= memcmp(lane, h, sizeof(h)) == 0;
    }
    return same;
}

static int test_sha256_pair(void)
{
    const uint8_t *blocks[2] = {(const uint8_t *)pye_sha256_k, (const uint8_t *)pye_sha384_initial};
    const uint8_t *other[2] = {blocks[1], blocks[0]};
    uint32_t pair[2][8];
    uint32_t one[2][8];

    memcpy(pair, pye_sha256_k, sizeof(pair));
    memcpy(one, pye_sha256_k, sizeof(one));
    pye_sha256_gather2_shani(pair[0], blocks, pair[1], other, 2);
    pye_sha256_gather(PYE_SHA256_PORTABLE, one[0], blocks, 2);
    pye_sha256_gather(PYE_SHA256_PORTABLE, one[1], other, 2);
    return memcmp(pair, one, sizeof(one)) == 0;
}
#endif

static int test_sha384(void)
{
    uint8_t out[PYE_SHA384_SIZE];

    pye_sha384(out, message, sizeof(message) - 1);
    return memcmp(out, sha384_want, sizeof(out)) == 0;
}

typedef void (*blocks_function)(uint64_t h[8], const uint8_t *data, size_t num_blocks);

static int test_sha512_blocks(blocks_function blocks)
{
    uint8_t block[PYE_SHA512_BLOCK_SIZE] = {0};
    uint64_t h[8];
    uint8_t out[PYE_SHA384_SIZE];

    memcpy(block, message, sizeof(message) - 1);
    block[sizeof(message) - 1] = 0x80;
    block[sizeof(block) - 2] = 8 * (sizeof(message) - 1) >> 8;
    block[sizeof(block) - 1] = 8 * (sizeof(message) - 1) & 0xff;
    memcpy(h, pye_sha384_initial, sizeof(h));
    blocks(h, block, 1);
    for (size_t i = 0; i < sizeof(out); i++) {
        out[i] = (uint8_t)(h[i / 8] >> (56 - 8 * (i % 8)));
    }
    return memcmp(out, sha384_want, sizeof(out)) == 0;
}

#if defined(__x86_64__)
/* All lanes hash one page, whose digest one lane's implementation knows too. */
static int test_lanes(uint32_t features)
{
    uint8_t page[PYE_LANES_PAGE];
    uint8_t want[PYE_SHA384_SIZE];
    uint8_t digests[8][PYE_SHA384_SIZE];
    uint8_t *out[8];
    const uint8_t *pages[8];
    int same = 1;

    for (size_t i = 0; i < sizeof(page); i++) {
        page[i] = (uint8_t)(i * 7 + (i >> 8));
    }
    for (size_t i = 0; i < 8; i++) {
        out[i] = digests[i];
        pages[i] = page;
    }
    pye_sha384(want, page, sizeof(page));
    if (features & PYE_CPU_AVX2) {
        pye_sha384_pages_x4_avx2(out, pages);
        for (size_t i = 0; i < 4; i++) {
            same &= memcmp(digests[i], want, sizeof(want)) == 0;
        }
    }
    if (features & PYE_CPU_AVX512) {
        pye_sha384_pages_x8_avx512(out, pages);
        for (size_t i = 0; i < 8; i++) {
            same &= memcmp(digests[i], want, sizeof(want)) == 0;
        }
    }
    return same;
}
#endif

static int test_hkdf(void)
{
    uint8_t secret[22];
    uint8_t out[sizeof(hkdf_want)];

    memset(secret, 0x0b, sizeof(secret));
    return pye_hkdf_sha256(out, sizeof(out), secret, sizeof(secret), NULL, 0, NULL, 0) == PYE_OK &&
           memcmp(out, hkdf_want, sizeof(out)) == 0;
}

typedef void (*expand_function)(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE]);
typedef void (*chain_function)(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                               size_t num_blocks);

static int test_chain(expand_function expand, chain_function chain)
{
    static const uint8_t zero[16] = {0};
    pye_cmac_key key;
    uint8_t state[16] = {0};

    expand(&key, cmac_key);
    chain(&key, state, zero, 1);
    return memcmp(state, cmac_aes_of_zero, sizeof(state)) == 0;
}

static int test_cmac(void)
{
    uint8_t out[PYE_CMAC_SIZE];

    pye_aes128_cmac(out, cmac_key, NULL, 0);
    return memcmp(out, cmac_want, sizeof(out)) == 0;
}

pye_status pye_hash_self_test(void)
{
    pye_status rc;

    PYE_REQUIRE(test_sha256(PYE_SHA256_PORTABLE), PYE_E_SELF_TEST);
    PYE_REQUIRE(test_sha256(pye_sha256_select()), PYE_E_SELF_TEST);
    PYE_REQUIRE(test_sha384(), PYE_E_SELF_TEST);
    PYE_REQUIRE(test_sha512_blocks(pye_sha512_blocks_portable), PYE_E_SELF_TEST);
#if defined(__x86_64__)
    if ((pye_cpu_features() & PYE_CPU_BMI2) != 0) {
        PYE_REQUIRE(test_sha512_blocks(pye_sha512_blocks_bmi2), PYE_E_SELF_TEST);
    }
    PYE_REQUIRE(test_lanes(pye_cpu_features()), PYE_E_SELF_TEST);
    if ((pye_cpu_features() & PYE_CPU_AVX2) != 0) {
        PYE_REQUIRE(test_sha256_lanes(&pye_sha256_lanes_avx2), PYE_E_SELF_TEST);
    }
    if ((pye_cpu_features() & PYE_CPU_AVX512) != 0) {
        PYE_REQUIRE(test_sha256_lanes(&pye_sha256_lanes_avx512), PYE_E_SELF_TEST);
    }
    if (pye_sha256_select() == PYE_SHA256_SHANI) {
        PYE_REQUIRE(test_sha256_pair(), PYE_E_SELF_TEST);
        if ((pye_cpu_features() & PYE_CPU_AVX) != 0) {
            PYE_REQUIRE(test_sha256_lanes(&pye_sha256_lanes_shani), PYE_E_SELF_TEST);
        }
    }
#elif defined(__aarch64__)
    if ((pye_cpu_features() & PYE_CPU_ARM_SHA512) != 0) {
        PYE_REQUIRE(test_sha512_blocks(pye_sha512_blocks_armv8), PYE_E_SELF_TEST);
    }
#endif
    PYE_REQUIRE(test_hkdf(), PYE_E_SELF_TEST);
    PYE_REQUIRE(test_chain(pye_cmac_expand_portable, pye_cmac_chain_portable), PYE_E_SELF_TEST);
#if defined(__x86_64__)
    if ((pye_cpu_features() & PYE_CPU_AESNI) != 0) {
        PYE_REQUIRE(test_chain(pye_cmac_expand_aesni, pye_cmac_chain_aesni), PYE_E_SELF_TEST);
    }
#elif defined(__aarch64__)
    if ((pye_cpu_features() & PYE_CPU_ARM_AES) != 0) {
        PYE_REQUIRE(test_chain(pye_cmac_expand_armv8, pye_cmac_chain_armv8), PYE_E_SELF_TEST);
    }
#endif
    PYE_REQUIRE(test_cmac(), PYE_E_SELF_TEST);
    rc = PYE_OK;
done:
    return rc;
}
