/* ghash_portable.h - GHASH (SP 800-38D, 6.4) by integer multiplications, without tables. */
#ifndef PYE_SRC_CRYPTO_GHASH_PORTABLE_H
#define PYE_SRC_CRYPTO_GHASH_PORTABLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t low;  /* H, byte-reversed and multiplied by x: see ghash_portable.c */
    uint64_t high;
} ghash_portable_key;

typedef struct {
    uint64_t low;
    uint64_t high;
} ghash_portable_state;

void ghash_portable_init(ghash_portable_key *key, const uint8_t h[16]);

/* ghash_portable_block absorbs one whole block. A new state is all zero. */
void ghash_portable_block(ghash_portable_state *state, const ghash_portable_key *key,
                          const uint8_t block[16]);

void ghash_portable_get(uint8_t out[16], const ghash_portable_state *state);

#endif
