/* gcm_portable.c - AES-GCM on any CPU, in constant time. */
#include "crypto/gcm_impl.h"

#define CHUNK ((size_t)AES_PORTABLE_BLOCKS * 16)

static void init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len)
{
    gcm_portable_key *k = &key->as.portable;
    uint8_t blocks[CHUNK] = {0};

    aes_portable_init(&k->aes, secret, secret_len);
    key->rounds = k->aes.rounds;
    aes_portable_encrypt(&k->aes, blocks, blocks);
    ghash_portable_init(&k->ghash, blocks);
    pye_wipe(blocks, sizeof(blocks));
}

static void set_counter(uint8_t block[16], uint32_t counter)
{
    for (int i = 0; i < 4; i++) {
        block[12 + i] = (uint8_t)(counter >> (24 - 8 * i));
    }
}

/* absorb hashes `len` bytes, the last block filled with zeros. */
static void absorb(ghash_portable_state *state, const ghash_portable_key *key, const uint8_t *data,
                   size_t len)
{
    uint8_t block[16];

    for (; len >= 16; data += 16, len -= 16) {
        ghash_portable_block(state, key, data);
    }
    if (len != 0) {
        memset(block, 0, sizeof(block));
        memcpy(block, data, len);
        ghash_portable_block(state, key, block);
        pye_wipe(block, sizeof(block));
    }
}

static void crypt(const pye_gcm_key *key, int opening, uint8_t *out, uint8_t *tag,
                  const uint8_t *iv, const uint8_t *in, size_t len, const uint8_t *aad,
                  size_t aad_len)
{
    const gcm_portable_key *k = &key->as.portable;
    ghash_portable_state state = {0, 0};
    uint8_t counters[CHUNK];
    uint8_t stream[CHUNK];
    uint8_t data[CHUNK];
    uint8_t mask[16];
    uint8_t lengths[16];
    uint32_t counter = 1;
    size_t used = 16; /* of the first chunk of key stream, its first block hides the tag */
    size_t done = 0;

    for (size_t i = 0; i < CHUNK; i += 16) {
        memcpy(counters + i, iv, PYE_GCM_IV_SIZE);
    }
    absorb(&state, &k->ghash, aad, aad_len);
    do {
        for (size_t i = 0; i < CHUNK; i += 16) {
            set_counter(counters + i, counter++);
        }
        aes_portable_encrypt(&k->aes, stream, counters);
        if (used != 0) {
            memcpy(mask, stream, sizeof(mask));
        }
        const size_t take = len - done < CHUNK - used ? len - done : CHUNK - used;
        /* one copy: what is hashed is what is decrypted, and out is never read back */
        if (take != 0) {
            memcpy(data, in + done, take);
        }
        if (opening) {
            absorb(&state, &k->ghash, data, take);
        }
        for (size_t i = 0; i < take; i++) {
            data[i] ^= stream[used + i];
        }
        if (!opening) {
            absorb(&state, &k->ghash, data, take);
        }
        if (take != 0) {
            memcpy(out + done, data, take);
        }
        done += take;
        used = 0;
    } while (done < len);
    gcm_store_be64(lengths, (uint64_t)aad_len * 8);
    gcm_store_be64(lengths + 8, (uint64_t)len * 8);
    ghash_portable_block(&state, &k->ghash, lengths);
    ghash_portable_get(lengths, &state);
    for (int i = 0; i < 16; i++) {
        tag[i] = lengths[i] ^ mask[i];
    }
    /* counters hold no secret */
    pye_wipe(&state, sizeof(state));
    pye_wipe(stream, sizeof(stream));
    pye_wipe(data, sizeof(data));
    pye_wipe(mask, sizeof(mask));
    pye_wipe(lengths, sizeof(lengths));
}

static void seal(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len)
{
    crypt(key, 0, out, tag, iv, in, len, aad, aad_len);
}

static void open(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len)
{
    crypt(key, 1, out, tag, iv, in, len, aad, aad_len);
}

static void crypt_pages(const pye_gcm_key *key, int opening, const gcm_page *pages,
                        size_t num_pages)
{
    uint8_t iv[PYE_GCM_IV_SIZE];

    for (size_t i = 0; i < num_pages; i++) {
        gcm_page_iv(iv, pages[i].version);
        crypt(key, opening, pages[i].out, pages[i].tag, iv, pages[i].in, GCM_PAGE_SIZE,
              pages[i].header, GCM_HEADER_SIZE);
    }
}

static void seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream)
{
    (void)stream;
    crypt_pages(key, 0, pages, num_pages);
}

static void open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream)
{
    (void)stream;
    crypt_pages(key, 1, pages, num_pages);
}

DEFINE_BURN_STACK(uint64_t, 4096)

static void clean(void)
{
    burn_stack();
    gcm_clear_registers();
}

const gcm_implementation pye_gcm_portable = {
    PYE_GCM_PORTABLE, 0, "portable", init, seal, open, seal_pages, open_pages, clean,
};
