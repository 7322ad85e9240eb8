/* sha512.c - SHA-384 and SHA-512 in plain C (FIPS 180-4, 4.1.3, 6.4 and 6.5). */
#include "crypto/sha512_lanes.h"

#include <string.h>

/* First 64 bits of the fractional parts of the cube roots of the first 80 primes (4.2.3). */
const uint64_t pye_sha512_k[80] __attribute__((aligned(64))) = {
    0x428a2f98d728ae22, 0x7137449123ef65cd, 0xb5c0fbcfec4d3b2f, 0xe9b5dba58189dbbc,
    0x3956c25bf348b538, 0x59f111f1b605d019, 0x923f82a4af194f9b, 0xab1c5ed5da6d8118,
    0xd807aa98a3030242, 0x12835b0145706fbe, 0x243185be4ee4b28c, 0x550c7dc3d5ffb4e2,
    0x72be5d74f27b896f, 0x80deb1fe3b1696b1, 0x9bdc06a725c71235, 0xc19bf174cf692694,
    0xe49b69c19ef14ad2, 0xefbe4786384f25e3, 0x0fc19dc68b8cd5b5, 0x240ca1cc77ac9c65,
    0x2de92c6f592b0275, 0x4a7484aa6ea6e483, 0x5cb0a9dcbd41fbd4, 0x76f988da831153b5,
    0x983e5152ee66dfab, 0xa831c66d2db43210, 0xb00327c898fb213f, 0xbf597fc7beef0ee4,
    0xc6e00bf33da88fc2, 0xd5a79147930aa725, 0x06ca6351e003826f, 0x142929670a0e6e70,
    0x27b70a8546d22ffc, 0x2e1b21385c26c926, 0x4d2c6dfc5ac42aed, 0x53380d139d95b3df,
    0x650a73548baf63de, 0x766a0abb3c77b2a8, 0x81c2c92e47edaee6, 0x92722c851482353b,
    0xa2bfe8a14cf10364, 0xa81a664bbc423001, 0xc24b8b70d0f89791, 0xc76c51a30654be30,
    0xd192e819d6ef5218, 0xd69906245565a910, 0xf40e35855771202a, 0x106aa07032bbd1b8,
    0x19a4c116b8d2d0c8, 0x1e376c085141ab53, 0x2748774cdf8eeb99, 0x34b0bcb5e19b48a8,
    0x391c0cb3c5c95a63, 0x4ed8aa4ae3418acb, 0x5b9cca4f7763e373, 0x682e6ff3d6b2b8a3,
    0x748f82ee5defb2fc, 0x78a5636f43172f60, 0x84c87814a1f0ab72, 0x8cc702081a6439ec,
    0x90befffa23631e28, 0xa4506cebde82bde9, 0xbef9a3f7b2c67915, 0xc67178f2e372532b,
    0xca273eceea26619c, 0xd186b8c721c0c207, 0xeada7dd6cde0eb1e, 0xf57d4f7fee6ed178,
    0x06f067aa72176fba, 0x0a637dc5a2c898a6, 0x113f9804bef90dae, 0x1b710b35131c471b,
    0x28db77f523047d84, 0x32caab7b40c72493, 0x3c9ebe0a15c9bebc, 0x431d67c49c100d4c,
    0x4cc5d4becb3e42b6, 0x597f299cfc657e2a, 0x5fcb6fab3ad6faec, 0x6c44198c4a475817,
};

const uint64_t pye_sha384_initial[8] = {
    0xcbbb9d5dc1059ed8, 0x629a292a367cd507, 0x9159015a3070dd17, 0x152fecd8f70e5939,
    0x67332667ffc00b31, 0x8eb44a8768581511, 0xdb0c2e0d64f98fa7, 0x47b5481dbefa4fa4,
};

static const uint64_t initial512[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

#define BLOCKS_FUNCTION pye_sha512_blocks_portable
#include "crypto/sha512_block_impl.h"

void pye_sha512_blocks(uint64_t h[8], const uint8_t *data, size_t num_blocks)
{
#if defined(__x86_64__)
    if (pye_cpu_features() & PYE_CPU_BMI2) {
        pye_sha512_blocks_bmi2(h, data, num_blocks);
        return;
    }
#elif defined(__aarch64__)
    if (pye_cpu_features() & PYE_CPU_ARM_SHA512) {
        pye_sha512_blocks_armv8(h, data, num_blocks);
        return;
    }
#endif
    pye_sha512_blocks_portable(h, data, num_blocks);
}

static void init(pye_sha512_ctx *ctx, const uint64_t h[8], uint32_t size)
{
    memset(ctx, 0, sizeof(*ctx));
    memcpy(ctx->h, h, sizeof(ctx->h));
    ctx->size = size;
}

void pye_sha384_init(pye_sha512_ctx *ctx)
{
    init(ctx, pye_sha384_initial, PYE_SHA384_SIZE);
}

void pye_sha512_init(pye_sha512_ctx *ctx)
{
    init(ctx, initial512, PYE_SHA512_SIZE);
}

void pye_sha512_update(pye_sha512_ctx *ctx, const void *data, size_t len)
{
    const uint8_t *in = data;

    if (len == 0) {
        return;
    }
    ctx->total += len;
    if (ctx->used != 0) {
        size_t part = sizeof(ctx->block) - ctx->used;

        if (part > len) {
            part = len;
        }
        memcpy(ctx->block + ctx->used, in, part);
        ctx->used += (uint32_t)part;
        in += part;
        len -= part;
        if (ctx->used < sizeof(ctx->block)) {
            return;
        }
        pye_sha512_blocks(ctx->h, ctx->block, 1);
        ctx->used = 0;
    }
    if (len >= sizeof(ctx->block)) {
        pye_sha512_blocks(ctx->h, in, len / sizeof(ctx->block));
        in += len & ~(sizeof(ctx->block) - 1);
        len &= sizeof(ctx->block) - 1;
    }
    if (len != 0) {
        memcpy(ctx->block, in, len);
        ctx->used = (uint32_t)len;
    }
}

void pye_sha512_final(pye_sha512_ctx *ctx, uint8_t *out)
{
    const size_t length_at = sizeof(ctx->block) - 16;

    ctx->block[ctx->used++] = 0x80;
    memset(ctx->block + ctx->used, 0, sizeof(ctx->block) - ctx->used);
    if (ctx->used > length_at) {
        pye_sha512_blocks(ctx->h, ctx->block, 1);
        memset(ctx->block, 0, sizeof(ctx->block));
    }
    /* The length in bits is a 128-bit number, big-endian. */
    ctx->block[length_at + 7] = (uint8_t)(ctx->total >> 61);
    for (size_t i = 0; i < 8; i++) {
        ctx->block[length_at + 8 + i] = (uint8_t)((ctx->total << 3) >> (56 - 8 * i));
    }
    pye_sha512_blocks(ctx->h, ctx->block, 1);
    for (size_t i = 0; i < ctx->size; i++) {
        out[i] = (uint8_t)(ctx->h[i / 8] >> (56 - 8 * (i % 8)));
    }
    pye_wipe(ctx, sizeof(*ctx));
}

void pye_sha384(uint8_t out[PYE_SHA384_SIZE], const void *data, size_t len)
{
    pye_sha512_ctx ctx;

    pye_sha384_init(&ctx);
    pye_sha512_update(&ctx, data, len);
    pye_sha512_final(&ctx, out);
}

void pye_sha512(uint8_t out[PYE_SHA512_SIZE], const void *data, size_t len)
{
    pye_sha512_ctx ctx;

    pye_sha512_init(&ctx);
    pye_sha512_update(&ctx, data, len);
    pye_sha512_final(&ctx, out);
}
