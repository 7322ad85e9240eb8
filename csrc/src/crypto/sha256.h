/* sha256.h - the block functions of SHA-256, for the core's own use. */
#ifndef PYE_SRC_CRYPTO_SHA256_H
#define PYE_SRC_CRYPTO_SHA256_H

#include "pyenclave/hash.h"

#define PYE_SHA256_PORTABLE 0u
#define PYE_SHA256_SHANI 1u
#define PYE_SHA256_ARMV8 16u

extern const uint32_t pye_sha256_k[64];

/* pye_sha256_select returns the variant for the present CPU features. */
uint32_t pye_sha256_select(void);

/* pye_sha256_blocks takes `num_blocks` contiguous blocks into `h`. */
void pye_sha256_blocks(uint32_t variant, uint32_t h[8], const uint8_t *data, size_t num_blocks);
/* pye_sha256_gather takes `num_blocks` blocks that lie anywhere into `h`, in the order of the
 * pointers: a stream whose parts lie apart is hashed without being copied together. */
void pye_sha256_gather(uint32_t variant, uint32_t h[8], const uint8_t *const *blocks,
                       size_t num_blocks);

void pye_sha256_blocks_portable(uint32_t h[8], const uint8_t *data, size_t num_blocks);
#if defined(__x86_64__)
void pye_sha256_blocks_shani(uint32_t h[8], const uint8_t *data, size_t num_blocks);
void pye_sha256_gather_shani(uint32_t h[8], const uint8_t *const *blocks, size_t num_blocks);
#elif defined(__aarch64__)
void pye_sha256_blocks_armv8(uint32_t h[8], const uint8_t *data, size_t num_blocks);
void pye_sha256_gather_armv8(uint32_t h[8], const uint8_t *const *blocks, size_t num_blocks);
#endif

#endif
