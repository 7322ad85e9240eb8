/* hmac.c - HMAC-SHA-256 (RFC 2104, FIPS 198-1). */
#include "pyenclave/hash.h"

#include <string.h>

void pye_hmac_sha256_init(pye_hmac_sha256_ctx *ctx, const void *key, size_t key_len)
{
    uint8_t pad[PYE_SHA256_BLOCK_SIZE] = {0};

    if (key_len > sizeof(pad)) {
        pye_sha256(pad, key, key_len);
    } else if (key_len != 0) {
        memcpy(pad, key, key_len);
    }
    for (size_t i = 0; i < sizeof(pad); i++) {
        pad[i] ^= 0x36;
    }
    pye_sha256_init(&ctx->inner);
    pye_sha256_update(&ctx->inner, pad, sizeof(pad));
    for (size_t i = 0; i < sizeof(pad); i++) {
        pad[i] ^= 0x36 ^ 0x5c;
    }
    pye_sha256_init(&ctx->outer);
    pye_sha256_update(&ctx->outer, pad, sizeof(pad));
    pye_wipe(pad, sizeof(pad));
}

void pye_hmac_sha256_update(pye_hmac_sha256_ctx *ctx, const void *data, size_t len)
{
    pye_sha256_update(&ctx->inner, data, len);
}

void pye_hmac_sha256_final(pye_hmac_sha256_ctx *ctx, uint8_t out[PYE_SHA256_SIZE])
{
    uint8_t inner[PYE_SHA256_SIZE];

    pye_sha256_final(&ctx->inner, inner);
    pye_sha256_update(&ctx->outer, inner, sizeof(inner));
    pye_sha256_final(&ctx->outer, out);
    pye_wipe(inner, sizeof(inner));
}

void pye_hmac_sha256(uint8_t out[PYE_SHA256_SIZE], const void *key, size_t key_len,
                     const void *data, size_t len)
{
    pye_hmac_sha256_ctx ctx;

    pye_hmac_sha256_init(&ctx, key, key_len);
    pye_hmac_sha256_update(&ctx, data, len);
    pye_hmac_sha256_final(&ctx, out);
}
