/* sha256.c - SHA-256: context handling and choice of the block function (FIPS 180-4, 6.2). */
#include "crypto/sha256.h"

#include <string.h>

static const uint32_t initial[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

uint32_t pye_sha256_select(void)
{
#if defined(__x86_64__)
    const uint32_t need = PYE_CPU_SHANI | PYE_CPU_SSSE3;

    if ((pye_cpu_features() & need) == need) {
        return PYE_SHA256_SHANI;
    }
#elif defined(__aarch64__)
    if (pye_cpu_features() & PYE_CPU_ARM_SHA2) {
        return PYE_SHA256_ARMV8;
    }
#endif
    return PYE_SHA256_PORTABLE;
}

const char *pye_sha256_variant(void)
{
    switch (pye_sha256_select()) {
    case PYE_SHA256_SHANI:
        return "sha-ni";
    case PYE_SHA256_ARMV8:
        return "armv8";
    default:
        return "portable";
    }
}

void pye_sha256_blocks(uint32_t variant, uint32_t h[8], const uint8_t *data, size_t num_blocks)
{
#if defined(__x86_64__)
    if (variant == PYE_SHA256_SHANI) {
        pye_sha256_blocks_shani(h, data, num_blocks);
        return;
    }
#elif defined(__aarch64__)
    if (variant == PYE_SHA256_ARMV8) {
        pye_sha256_blocks_armv8(h, data, num_blocks);
        return;
    }
#endif
    (void)variant;
    pye_sha256_blocks_portable(h, data, num_blocks);
}

void pye_sha256_gather(uint32_t variant, uint32_t h[8], const uint8_t *const *blocks,
                       size_t num_blocks)
{
#if defined(__x86_64__)
    if (variant == PYE_SHA256_SHANI) {
        pye_sha256_gather_shani(h, blocks, num_blocks);
        return;
    }
#elif defined(__aarch64__)
    if (variant == PYE_SHA256_ARMV8) {
        pye_sha256_gather_armv8(h, blocks, num_blocks);
        return;
    }
#endif
    (void)variant;
    for (size_t i = 0; i < num_blocks; i++) {
        pye_sha256_blocks_portable(h, blocks[i], 1);
    }
}

void pye_sha256_init(pye_sha256_ctx *ctx)
{
    memcpy(ctx->h, initial, sizeof(initial));
    ctx->total = 0;
    ctx->used = 0;
    ctx->variant = pye_sha256_select();
    memset(ctx->block, 0, sizeof(ctx->block));
}

void pye_sha256_update(pye_sha256_ctx *ctx, const void *data, size_t len)
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
        pye_sha256_blocks(ctx->variant, ctx->h, ctx->block, 1);
        ctx->used = 0;
    }
    if (len >= sizeof(ctx->block)) {
        pye_sha256_blocks(ctx->variant, ctx->h, in, len / sizeof(ctx->block));
        in += len & ~(sizeof(ctx->block) - 1);
        len &= sizeof(ctx->block) - 1;
    }
    if (len != 0) {
        memcpy(ctx->block, in, len);
        ctx->used = (uint32_t)len;
    }
}

void pye_sha256_final(pye_sha256_ctx *ctx, uint8_t out[PYE_SHA256_SIZE])
{
    const uint64_t bits = ctx->total << 3;
    const size_t length_at = sizeof(ctx->block) - 8;

    ctx->block[ctx->used++] = 0x80;
    memset(ctx->block + ctx->used, 0, sizeof(ctx->block) - ctx->used);
    if (ctx->used > length_at) {
        pye_sha256_blocks(ctx->variant, ctx->h, ctx->block, 1);
        memset(ctx->block, 0, sizeof(ctx->block));
    }
    for (size_t i = 0; i < 8; i++) {
        ctx->block[length_at + i] = (uint8_t)(bits >> (56 - 8 * i));
    }
    pye_sha256_blocks(ctx->variant, ctx->h, ctx->block, 1);
    for (size_t i = 0; i < PYE_SHA256_SIZE; i++) {
        out[i] = (uint8_t)(ctx->h[i / 4] >> (24 - 8 * (i % 4)));
    }
    pye_wipe(ctx, sizeof(*ctx));
}

void pye_sha256(uint8_t out[PYE_SHA256_SIZE], const void *data, size_t len)
{
    pye_sha256_ctx ctx;

    pye_sha256_init(&ctx);
    pye_sha256_update(&ctx, data, len);
    pye_sha256_final(&ctx, out);
}
