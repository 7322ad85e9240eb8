/*
 * hash.h - SHA-2, HMAC, HKDF and CMAC.
 *
 * A context is a plain struct that lives where the caller puts it, usually on the stack; its
 * fields belong to the core. It has no allocation behind it, may be copied by assignment (the copy
 * then goes its own way), and is wiped by *_final. One context is used by one thread at a time;
 * the one-shot functions are thread-safe. The implementation is chosen at *_init from the CPU
 * features of that moment. `data` may be NULL when its length is 0; nothing needs alignment.
 */
#ifndef PYENCLAVE_HASH_H
#define PYENCLAVE_HASH_H

#include "pyenclave/base.h"

/* ---- SHA-2 (FIPS 180-4) ------------------------------------------------------------------- */

#define PYE_SHA256_SIZE 32
#define PYE_SHA256_BLOCK_SIZE 64
#define PYE_SHA384_SIZE 48
#define PYE_SHA512_SIZE 64
#define PYE_SHA512_BLOCK_SIZE 128

typedef struct {
    uint32_t h[8];
    uint64_t total; /* bytes taken so far, the ones in `block` included */
    uint32_t used;  /* bytes waiting in `block` */
    uint32_t variant;
    uint8_t block[PYE_SHA256_BLOCK_SIZE];
} pye_sha256_ctx;

typedef struct {
    uint64_t h[8];
    uint64_t total;
    uint32_t used;
    uint32_t size; /* of the digest: 48 or 64 */
    uint8_t block[PYE_SHA512_BLOCK_SIZE];
} pye_sha512_ctx;

void pye_sha256_init(pye_sha256_ctx *ctx);
void pye_sha256_update(pye_sha256_ctx *ctx, const void *data, size_t len);
/* pye_sha256_final writes the digest and wipes `ctx`, which then needs a new *_init. */
void pye_sha256_final(pye_sha256_ctx *ctx, uint8_t out[PYE_SHA256_SIZE]);
void pye_sha256(uint8_t out[PYE_SHA256_SIZE], const void *data, size_t len);
/* pye_sha256_variant returns the name of the implementation that a context made now uses. */
const char *pye_sha256_variant(void);

/* SHA-384 and SHA-512 share context, update and final; *_final writes 48 or 64 bytes, as begun. */
void pye_sha384_init(pye_sha512_ctx *ctx);
void pye_sha512_init(pye_sha512_ctx *ctx);
void pye_sha512_update(pye_sha512_ctx *ctx, const void *data, size_t len);
void pye_sha512_final(pye_sha512_ctx *ctx, uint8_t *out);
void pye_sha384(uint8_t out[PYE_SHA384_SIZE], const void *data, size_t len);
void pye_sha512(uint8_t out[PYE_SHA512_SIZE], const void *data, size_t len);

/* ---- HMAC-SHA-256 (RFC 2104, FIPS 198-1) -------------------------------------------------- */

typedef struct {
    pye_sha256_ctx inner;
    pye_sha256_ctx outer;
} pye_hmac_sha256_ctx;

/* pye_hmac_sha256_init takes a key of any length; one longer than a block is hashed first. */
void pye_hmac_sha256_init(pye_hmac_sha256_ctx *ctx, const void *key, size_t key_len);
void pye_hmac_sha256_update(pye_hmac_sha256_ctx *ctx, const void *data, size_t len);
void pye_hmac_sha256_final(pye_hmac_sha256_ctx *ctx, uint8_t out[PYE_SHA256_SIZE]);
/* pye_hmac_sha256 computes a MAC. To check one, compare with pye_ct_equal. */
void pye_hmac_sha256(uint8_t out[PYE_SHA256_SIZE], const void *key, size_t key_len,
                     const void *data, size_t len);

/* ---- HKDF-SHA-256 (RFC 5869) -------------------------------------------------------------- */

#define PYE_HKDF_SHA256_MAX 8160

/* pye_hkdf_sha256_extract: section 2.2. An empty salt stands for 32 zero bytes. */
void pye_hkdf_sha256_extract(uint8_t prk[PYE_SHA256_SIZE], const void *salt, size_t salt_len,
                             const void *secret, size_t secret_len);
/* pye_hkdf_sha256_expand: section 2.3. `prk` has at least 32 bytes, `out` 1 to 8160 (255 blocks),
 * otherwise PYE_E_LENGTH and `out` is zeroed. `out` must not overlap an input. */
PYE_MUST_USE pye_status pye_hkdf_sha256_expand(uint8_t *out, size_t out_len, const void *prk,
                                               size_t prk_len, const void *info, size_t info_len);
/* pye_hkdf_sha256 extracts and expands. */
PYE_MUST_USE pye_status pye_hkdf_sha256(uint8_t *out, size_t out_len, const void *secret,
                                        size_t secret_len, const void *salt, size_t salt_len,
                                        const void *info, size_t info_len);

/* ---- AES-128-CMAC (RFC 4493, NIST SP 800-38B) --------------------------------------------- */

#define PYE_CMAC_SIZE 16
#define PYE_CMAC_KEY_SIZE 16

/* pye_aes128_cmac computes a MAC over `len` bytes. To check one, compare with pye_ct_equal. The
 * time depends on `len` only. `out` may overlap the inputs. */
void pye_aes128_cmac(uint8_t out[PYE_CMAC_SIZE], const uint8_t key[PYE_CMAC_KEY_SIZE],
                     const void *data, size_t len);

/* ---- self-test ---------------------------------------------------------------------------- */

/* pye_hash_self_test runs a known answer through every implementation that this CPU can run.
 * Returns PYE_E_SELF_TEST if one is wrong. */
PYE_MUST_USE pye_status pye_hash_self_test(void);

#endif
