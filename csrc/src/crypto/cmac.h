/* cmac.h - the chained AES-128 under CMAC, one implementation an instruction set. */
#ifndef PYE_SRC_CRYPTO_CMAC_H
#define PYE_SRC_CRYPTO_CMAC_H

#include "pyenclave/hash.h"

#define PYE_CMAC_ROUND_KEYS 11

/* pye_cmac_expand_* writes the eleven round keys of AES-128 (FIPS 197, 5.2).
 * pye_cmac_chain_* sets state = AES(state ^ block) for each of `num_blocks` blocks of 16 bytes. */
void pye_cmac_expand_portable(uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], const uint8_t key[16]);
void pye_cmac_chain_portable(const uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], uint8_t state[16],
                             const uint8_t *blocks, size_t num_blocks);
#if defined(__x86_64__)
void pye_cmac_expand_aesni(uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], const uint8_t key[16]);
void pye_cmac_chain_aesni(const uint8_t round_keys[PYE_CMAC_ROUND_KEYS][16], uint8_t state[16],
                          const uint8_t *blocks, size_t num_blocks);
#endif

#endif
