/* cmac.h - the chained AES-128 under CMAC, one implementation an instruction set. */
#ifndef PYE_SRC_CRYPTO_CMAC_H
#define PYE_SRC_CRYPTO_CMAC_H

#include "crypto/aes_portable.h"
#include "pyenclave/hash.h"

typedef union {
    uint8_t round_keys[11][16];
    aes_portable_key portable;
} pye_cmac_key;

/* pye_cmac_expand_* expands an AES-128 key (FIPS 197, 5.2).
 * pye_cmac_chain_* sets state = AES(state ^ block) for each of `num_blocks` blocks of 16 bytes;
 * the key must come from the same implementation. */
void pye_cmac_expand_portable(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE]);
void pye_cmac_chain_portable(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                             size_t num_blocks);
#if defined(__x86_64__)
void pye_cmac_expand_aesni(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE]);
void pye_cmac_chain_aesni(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                          size_t num_blocks);
#elif defined(__aarch64__)
void pye_cmac_expand_armv8(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE]);
void pye_cmac_chain_armv8(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                          size_t num_blocks);
#endif

#endif
