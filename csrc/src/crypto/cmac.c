/* cmac.c - AES-128-CMAC (RFC 4493; NIST SP 800-38B, 6.1 and 6.2). */
#include "crypto/cmac.h"

#include <string.h>

typedef struct {
    pye_cmac_key key;
    uint8_t state[16];
    uint8_t subkey[16];
    uint8_t last[16];
} work_area;

void pye_cmac_expand_portable(pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE])
{
    aes_portable_init(&key->portable, secret, PYE_CMAC_KEY_SIZE);
}

void pye_cmac_chain_portable(const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                             size_t num_blocks)
{
    /* A chain has one block at a time; what is worked on beside it is of no use. */
    uint8_t batch[AES_PORTABLE_BLOCKS * 16] = {0};

    for (size_t i = 0; i < num_blocks; i++) {
        for (size_t j = 0; j < 16; j++) {
            batch[j] = (uint8_t)(state[j] ^ blocks[16 * i + j]);
        }
        aes_portable_encrypt(&key->portable, batch, batch);
        memcpy(state, batch, 16);
    }
    pye_wipe(batch, sizeof(batch));
}

static void expand(int fast, pye_cmac_key *key, const uint8_t secret[PYE_CMAC_KEY_SIZE])
{
#if defined(__x86_64__)
    if (fast) {
        pye_cmac_expand_aesni(key, secret);
        return;
    }
#elif defined(__aarch64__)
    if (fast) {
        pye_cmac_expand_armv8(key, secret);
        return;
    }
#endif
    (void)fast;
    pye_cmac_expand_portable(key, secret);
}

static void chain(int fast, const pye_cmac_key *key, uint8_t state[16], const uint8_t *blocks,
                  size_t num_blocks)
{
#if defined(__x86_64__)
    if (fast) {
        pye_cmac_chain_aesni(key, state, blocks, num_blocks);
        return;
    }
#elif defined(__aarch64__)
    if (fast) {
        pye_cmac_chain_armv8(key, state, blocks, num_blocks);
        return;
    }
#endif
    (void)fast;
    pye_cmac_chain_portable(key, state, blocks, num_blocks);
}

/* Doubling in GF(2^128), big-endian (SP 800-38B, 6.1); the carry is taken without a branch. */
static void twice(uint8_t x[16])
{
    const uint8_t carry = (uint8_t)(0u - (uint32_t)(x[0] >> 7));

    for (size_t i = 0; i < 15; i++) {
        x[i] = (uint8_t)((uint32_t)(x[i] << 1) | (uint32_t)(x[i + 1] >> 7));
    }
    x[15] = (uint8_t)((uint32_t)(x[15] << 1) ^ (0x87u & carry));
}

void pye_aes128_cmac(uint8_t out[PYE_CMAC_SIZE], const uint8_t key[PYE_CMAC_KEY_SIZE],
                     const void *data, size_t len)
{
    const int fast = (pye_cpu_features() & (PYE_CPU_AESNI | PYE_CPU_ARM_AES)) != 0;
    const uint8_t *in = data;
    /* The last block is never chained with the others, even if it is full; empty counts as one. */
    const size_t before = len == 0 ? 0 : (len - 1) / 16;
    const size_t rest = len - before * 16;
    work_area work;

    memset(&work, 0, sizeof(work));
    expand(fast, &work.key, key);
    chain(fast, &work.key, work.subkey, work.last, 1); /* L = AES(0) */
    twice(work.subkey);
    if (rest != 16) {
        twice(work.subkey);
        work.last[rest] = 0x80;
    }
    if (before != 0) {
        chain(fast, &work.key, work.state, in, before);
    }
    if (rest != 0) {
        memcpy(work.last, in + before * 16, rest);
    }
    for (size_t i = 0; i < 16; i++) {
        work.last[i] ^= work.subkey[i];
    }
    chain(fast, &work.key, work.state, work.last, 1);
    memcpy(out, work.state, PYE_CMAC_SIZE);
    pye_wipe(&work, sizeof(work));
}
