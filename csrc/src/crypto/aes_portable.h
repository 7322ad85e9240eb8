/* aes_portable.h - AES in bit slices: no table, no branch and no index that depends on secrets. */
#ifndef PYE_SRC_CRYPTO_AES_PORTABLE_H
#define PYE_SRC_CRYPTO_AES_PORTABLE_H

#include <stddef.h>
#include <stdint.h>

/* Blocks that are worked on at once: four in each 64-bit lane. */
#define AES_PORTABLE_BLOCKS 8

typedef struct {
    uint64_t slices[15][8]; /* each round key, the same for every block, in slices */
    uint32_t rounds;
} aes_portable_key;

/* aes_portable_init expands a key of 16 or 32 bytes (FIPS 197, 5.2). */
void aes_portable_init(aes_portable_key *key, const uint8_t *secret, size_t secret_len);

/* aes_portable_encrypt encrypts AES_PORTABLE_BLOCKS blocks; `out` may equal `in`. */
void aes_portable_encrypt(const aes_portable_key *key, uint8_t out[AES_PORTABLE_BLOCKS * 16],
                          const uint8_t in[AES_PORTABLE_BLOCKS * 16]);

#endif
