/* sha512_lanes.h - SHA-384 of pages that are independent of each other, several in one go. */
#ifndef PYE_SRC_CRYPTO_SHA512_LANES_H
#define PYE_SRC_CRYPTO_SHA512_LANES_H

#include "pyenclave/hash.h"

#define PYE_LANES_PAGE 4096

extern const uint64_t pye_sha512_k[80];
extern const uint64_t pye_sha384_initial[8];

#if defined(__x86_64__)
/* Each hashes the pages at `pages`, `pages` + 4096, … into 48 bytes each at `out`. */
void pye_sha384_pages_x4_avx2(uint8_t *out, const uint8_t *pages);
void pye_sha384_pages_x8_avx512(uint8_t *out, const uint8_t *pages);
#endif

#endif
