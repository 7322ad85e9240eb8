/* sha256_lanes.h - SHA-256 of several messages at once, in step: one a lane of a vector, or two or
 * four side by side with the SHA extensions.
 *
 * The state of all lanes is kept word by word: h[i][lane]. Lanes that are not used hash what they
 * are given and nobody looks at them. What is measured is not secret: nothing is wiped. */
#ifndef PYE_SRC_CRYPTO_SHA256_LANES_H
#define PYE_SRC_CRYPTO_SHA256_LANES_H

#include "crypto/sha256.h"

#define PYE_SHA256_MAX_LANES 16

typedef struct {
    _Alignas(64) uint32_t h[8][PYE_SHA256_MAX_LANES];
} pye_sha256_lanes;

/* Blocks as numbers, one a column: words 0 … 15 as FIPS 180-4 (6.2.2) numbers them. Expanded, all
 * 64 words of the schedule with the rounds' constants added, in an order that only the code knows. */
typedef struct {
    _Alignas(64) uint32_t w[64][PYE_SHA256_MAX_LANES];
} pye_sha256_words;

typedef struct {
    const char *name;
    uint32_t lanes;
    uint32_t worth; /* so many messages take longer in pairs with the SHA extensions */
    /* Takes `num_blocks` contiguous blocks at data[lane] into each lane. */
    void (*blocks)(pye_sha256_lanes *state, const uint8_t *const *data, size_t num_blocks);
    /* Takes one block into each lane: the one in its column, not expanded. */
    void (*own)(pye_sha256_lanes *state, const pye_sha256_words *words);
    /* For each column, expanded: takes it as a block into every lane, then the next `num_blocks`
     * contiguous blocks from data[lane] on into each. */
    void (*columns)(pye_sha256_lanes *state, const pye_sha256_words *words,
                    const uint8_t *const *data, size_t num_blocks);
    /* Expands all columns. */
    void (*expand)(pye_sha256_words *words);
} pye_sha256_lanes_code;

/* pye_sha256_lanes_select returns the lanes for `num` messages and the present CPU features; NULL: one
 * message after the other, or two, is faster. */
const pye_sha256_lanes_code *pye_sha256_lanes_select(size_t num);

/* pye_sha256_gather2 does for two messages what pye_sha256_gather does for one. */
void pye_sha256_gather2(uint32_t variant, uint32_t h0[8], const uint8_t *const *blocks0,
                        uint32_t h1[8], const uint8_t *const *blocks1, size_t num_blocks);

#if defined(__x86_64__)
extern const pye_sha256_lanes_code pye_sha256_lanes_avx2;
extern const pye_sha256_lanes_code pye_sha256_lanes_avx512;
extern const pye_sha256_lanes_code pye_sha256_lanes_shani;

void pye_sha256_gather2_shani(uint32_t h0[8], const uint8_t *const *blocks0, uint32_t h1[8],
                              const uint8_t *const *blocks1, size_t num_blocks);
#endif

#endif
