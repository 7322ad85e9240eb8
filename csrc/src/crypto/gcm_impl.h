/* gcm_impl.h - what gcm.c and page.c know of an implementation, and the key's layout. */
#ifndef PYE_SRC_CRYPTO_GCM_IMPL_H
#define PYE_SRC_CRYPTO_GCM_IMPL_H

#include "base/public.h"
#include "crypto/aes_portable.h"
#include "crypto/ghash_portable.h"
#include "pyenclave/gcm.h"

#include <string.h>

#define GCM_PAGE_SIZE 4096
#define GCM_HEADER_SIZE 64
/* A page is 4 blocks of header, 256 of data and one of lengths. */
#define GCM_PAGE_BLOCKS 261
#define GCM_MAX_ROUNDS 14

/* One page to seal or open under the IV of its version, with its header as AAD. */
typedef struct {
    _Alignas(64) uint8_t header[GCM_HEADER_SIZE];
    const uint8_t *in;
    uint8_t *out;
    uint8_t *tag; /* where the computed tag goes, when sealing and when opening */
    uint64_t version;
} gcm_page;

typedef struct {
    uint32_t id;
    uint32_t features;
    const char *name;
    void (*init)(pye_gcm_key *key, const uint8_t *secret, size_t secret_len);
    /* Both write the tag that belongs to the ciphertext; gcm.c compares. */
    void (*seal)(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len);
    void (*open)(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len);
    /* `stream`: the outputs are aligned to 64 and should bypass the cache. */
    void (*seal_pages)(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream);
    void (*open_pages)(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream);
    /* Zeroes what the functions above have left in registers and in their stack frames. To be
     * called from the function that called them. */
    void (*clean)(void);
} gcm_implementation;

/* gcm_clear_registers zeroes the vector registers; `clean` of all but the widest code calls it. */
void gcm_clear_registers(void);

/* DEFINE_BURN_STACK makes a function that zeroes `size` bytes of stack, a `lane` at a time. */
#define DEFINE_BURN_STACK(lane, size)                                                                    \
    static __attribute__((noinline)) void burn_stack(void)                                         \
    {                                                                                              \
        lane area[(size) / sizeof(lane)];                                                          \
                                                                                                   \
        for (size_t i = 0; i < sizeof(area) / sizeof(area[0]); i++) {                              \
            area[i] = (lane){0};                                                                   \
            __asm__ volatile("" : : "r"(&area[i]) : "memory"); /* the store stays */               \
        }                                                                                          \
    }

typedef struct {
    aes_portable_key aes;
    ghash_portable_key ghash;
} gcm_portable_key;

/* Blocks are kept as bytes here, so that this header needs no vector types. */
typedef struct {
    _Alignas(64) uint8_t round_keys[GCM_MAX_ROUNDS + 1][16];
    uint8_t powers[8][16];  /* H^8 … H^1, byte-reversed and times x */
    uint8_t halves[8][16];  /* low ^ high half of each, in both halves */
} gcm_aesni_key;

/* Of VAES, with 256 and with 512 bits. */
typedef struct {
    _Alignas(64) uint8_t round_keys[GCM_MAX_ROUNDS + 1][16];
    uint8_t first_tag[16];        /* what counter 1 adds to the first AES round */
    _Alignas(64) uint8_t first[256][16]; /* the same for counters 2 … 257 */
    uint8_t wrap[4][16]; /* for 254 and 255, then 0 and 1: where a counter's low byte wraps */
    /* powers[i] = H^(261 - i); what follows H^1 is zero. */
    uint8_t powers[GCM_PAGE_BLOCKS + 3][16];
    uint8_t halves[GCM_PAGE_BLOCKS + 3][16];
    uint8_t lengths[2][16]; /* the block of lengths of a page, times H: low and high 128 bits */
} gcm_wide_key;

typedef struct {
    _Alignas(64) uint8_t round_keys[GCM_MAX_ROUNDS + 1][16];
    uint8_t powers[8][16]; /* as of AES-NI */
    uint8_t halves[8][16];
} gcm_armv8_key;

struct pye_gcm_key {
    const gcm_implementation *implementation; /* NULL: wiped, or never made */
    uint32_t rounds;
    _Alignas(64) union {
        gcm_portable_key portable;
        gcm_aesni_key aesni;
        gcm_wide_key wide;
        gcm_armv8_key armv8;
    } as;
};

extern const gcm_implementation pye_gcm_portable;
#if defined(__x86_64__)
extern const gcm_implementation pye_gcm_aesni;
extern const gcm_implementation pye_gcm_vaes256;
extern const gcm_implementation pye_gcm_vaes512;
#elif defined(__aarch64__)
extern const gcm_implementation pye_gcm_armv8;
#endif

/* gcm_tag_equal compares two tags in constant time; `a` is read once. */
static inline int gcm_tag_equal(const uint8_t a[16], const uint8_t b[16])
{
    uint64_t x[2];
    uint64_t y[2];

    memcpy(x, a, sizeof(x));
    memcpy(y, b, sizeof(y));
    uint64_t difference = (x[0] ^ y[0]) | (x[1] ^ y[1]);
    /* The compiler must not see that only zero matters, or it may branch early. */
    __asm__ volatile("" : "+r"(difference));
    difference = difference == 0;
    PYE_PUBLIC(difference);
    return (int)difference;
}

static inline void gcm_store_be64(uint8_t out[8], uint64_t value)
{
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)(value >> (56 - 8 * i));
    }
}

/* gcm_page_iv writes the IV of a page version: 64 bits, most significant byte first, then zeros. */
static inline void gcm_page_iv(uint8_t iv[PYE_GCM_IV_SIZE], uint64_t version)
{
    gcm_store_be64(iv, version);
    memset(iv + 8, 0, 4);
}

/* gcm_overlap tells whether two ranges share a byte. */
static inline int gcm_overlap(const void *a, size_t a_len, const void *b, size_t b_len)
{
    const uintptr_t x = (uintptr_t)a;
    const uintptr_t y = (uintptr_t)b;

    return a_len != 0 && b_len != 0 && (x < y ? y - x < a_len : x - y < b_len);
}

#endif
