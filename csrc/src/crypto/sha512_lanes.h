/* sha512_lanes.h - the block functions of SHA-512, for one message and for several pages at once. */
#ifndef PYE_SRC_CRYPTO_SHA512_LANES_H
#define PYE_SRC_CRYPTO_SHA512_LANES_H

#include "pyenclave/hash.h"

#define PYE_LANES_PAGE 4096

extern const uint64_t pye_sha512_k[80];
extern const uint64_t pye_sha384_initial[8];

/* pye_sha512_blocks takes `num_blocks` blocks into the state `h`. */
void pye_sha512_blocks(uint64_t h[8], const uint8_t *data, size_t num_blocks);
void pye_sha512_blocks_portable(uint64_t h[8], const uint8_t *data, size_t num_blocks);

#if defined(__x86_64__)
void pye_sha512_blocks_bmi2(uint64_t h[8], const uint8_t *data, size_t num_blocks);

/* Each hashes four or eight pages, wherever they lie, into 48 bytes each. */
void pye_sha384_pages_x4_avx2(uint8_t *const out[4], const uint8_t *const pages[4]);
void pye_sha384_pages_x8_avx512(uint8_t *const out[8], const uint8_t *const pages[8]);
#elif defined(__aarch64__)
void pye_sha512_blocks_armv8(uint64_t h[8], const uint8_t *data, size_t num_blocks);
#endif

#endif
