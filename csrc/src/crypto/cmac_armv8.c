/* cmac_armv8.c - chained AES-128 with AESE and AESMC (Arm ARM, C7.2). */
#include "crypto/cmac.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("aes"))), apply_to = function)
#else
#pragma GCC target("+crypto")
#endif
#include "crypto/armv8.h"

void pye_cmac_expand_armv8(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE])
{
    (void)expand_key(key->round_keys, secret, PYE_CMAC_KEY_SIZE);
}

void pye_cmac_chain_armv8(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                          size_t num_blocks)
{
    v128 x = load128(state);

    for (size_t i = 0; i < num_blocks; i++) {
        x = veorq_u8(x, load128(blocks + 16 * i));
        x = encrypt128(key->round_keys[0], 10, x);
    }
    store128(state, x);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pye_cmac_armv8_unused; /* a translation unit must not be empty */
#endif
