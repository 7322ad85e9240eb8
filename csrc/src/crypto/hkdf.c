/* hkdf.c - HKDF-SHA-256 (RFC 5869). */
#include "base/check.h"
#include "pyenclave/hash.h"

#include <string.h>

void pye_hkdf_sha256_extract(uint8_t prk[PYE_SHA256_SIZE], const void *salt, size_t salt_len,
                             const void *secret, size_t secret_len)
{
    /* An empty HMAC key is padded with zeros, so it is the RFC's default salt of itself. */
    pye_hmac_sha256(prk, salt, salt_len, secret, secret_len);
}

pye_status pye_hkdf_sha256_expand(uint8_t *out, size_t out_len, const void *prk, size_t prk_len,
                                  const void *info, size_t info_len)
{
    pye_status rc;
    pye_hmac_sha256_ctx keyed;
    pye_hmac_sha256_ctx ctx;
    uint8_t block[PYE_SHA256_SIZE];
    size_t done_len = 0;

    PYE_REQUIRE(out_len != 0 && out_len <= PYE_HKDF_SHA256_MAX, PYE_E_LENGTH);
    PYE_REQUIRE(prk_len >= PYE_SHA256_SIZE, PYE_E_LENGTH);
    pye_hmac_sha256_init(&keyed, prk, prk_len);
    for (uint8_t counter = 1; done_len < out_len; counter++) {
        const size_t part = out_len - done_len < sizeof(block) ? out_len - done_len : sizeof(block);

        ctx = keyed;
        if (counter != 1) {
            pye_hmac_sha256_update(&ctx, block, sizeof(block));
        }
        pye_hmac_sha256_update(&ctx, info, info_len);
        pye_hmac_sha256_update(&ctx, &counter, 1);
        pye_hmac_sha256_final(&ctx, block);
        memcpy(out + done_len, block, part);
        done_len += part;
    }
    pye_wipe(&keyed, sizeof(keyed));
    pye_wipe(block, sizeof(block));
    rc = PYE_OK;
done:
    if (rc != PYE_OK && out_len != 0) {
        memset(out, 0, out_len);
    }
    return rc;
}

pye_status pye_hkdf_sha256(uint8_t *out, size_t out_len, const void *secret, size_t secret_len,
                           const void *salt, size_t salt_len, const void *info, size_t info_len)
{
    pye_status rc;
    uint8_t prk[PYE_SHA256_SIZE];

    pye_hkdf_sha256_extract(prk, salt, salt_len, secret, secret_len);
    rc = pye_hkdf_sha256_expand(out, out_len, prk, sizeof(prk), info, info_len);
    pye_wipe(prk, sizeof(prk));
    return rc;
}
