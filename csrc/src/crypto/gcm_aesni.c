/* gcm_aesni.c - AES-GCM with AES-NI and PCLMULQDQ, eight blocks at once, one reduction for eight
 * (Gueron and Kounavis, "Intel carry-less multiplication and its usage for computing the GCM
 * mode"). */
#if defined(__x86_64__)
#pragma GCC target("ssse3,aes,pclmul")
#include <immintrin.h>

#include "crypto/gcm_x86.h"

#define WIDTH 8
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    x128 low;
    x128 high;
    x128 middle;
} product;

static void init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len)
{
    gcm_aesni_key *k = &key->as.aesni;

    key->rounds = expand_key(k->round_keys, secret, secret_len);
    const x128 h =
        times_x(reverse128(encrypt128(k->round_keys[0], key->rounds, _mm_setzero_si128())));
    x128 power = h;
    for (int i = WIDTH - 1; i >= 0; i--) {
        store128(k->powers[i], power);
        store128(k->halves[i], _mm_xor_si128(power, swap128(power)));
        x128 low;
        x128 high;
        multiply128(power, h, &low, &high);
        power = reduce128(low, high);
    }
}

/* add_product adds x times H^exponent. */
INLINE void add_product(product *sum, const gcm_aesni_key *k, x128 x, size_t exponent)
{
    const x128 power = load128(k->powers[WIDTH - exponent]);
    const x128 half = load128(k->halves[WIDTH - exponent]);

    sum->low = _mm_xor_si128(sum->low, _mm_clmulepi64_si128(x, power, 0x00));
    sum->high = _mm_xor_si128(sum->high, _mm_clmulepi64_si128(x, power, 0x11));
    sum->middle = _mm_xor_si128(
        sum->middle, _mm_clmulepi64_si128(_mm_xor_si128(x, swap128(x)), half, 0x00));
}

INLINE product no_product(void)
{
    return (product){_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
}

INLINE x128 reduce_product(const product *p)
{
    const x128 middle = _mm_xor_si128(p->middle, _mm_xor_si128(p->low, p->high));

    return reduce128(_mm_xor_si128(p->low, _mm_slli_si128(middle, 8)),
                     _mm_xor_si128(p->high, _mm_srli_si128(middle, 8)));
}

/* absorb_block is the slow way, for what is left over. */
INLINE x128 absorb_block(const gcm_aesni_key *k, x128 hash, x128 block)
{
    product p = no_product();

    add_product(&p, k, _mm_xor_si128(hash, reverse128(block)), 1);
    return reduce_product(&p);
}

INLINE x128 absorb_aad(const gcm_aesni_key *k, x128 hash, const uint8_t *aad, size_t len)
{
    for (; len >= WIDTH * 16; aad += WIDTH * 16, len -= WIDTH * 16) {
        product p = no_product();

        for (size_t i = 0; i < WIDTH; i++) {
            x128 x = reverse128(load128(aad + 16 * i));
            x = i == 0 ? _mm_xor_si128(x, hash) : x;
            add_product(&p, k, x, WIDTH - i);
        }
        hash = reduce_product(&p);
    }
    for (; len >= 16; aad += 16, len -= 16) {
        hash = absorb_block(k, hash, load128(aad));
    }
    return len == 0 ? hash : absorb_block(k, hash, load_part(aad, len));
}

INLINE x128 counter_block(x128 *counter)
{
    const x128 block = reverse128(*counter);

    *counter = _mm_add_epi32(*counter, _mm_set_epi32(0, 0, 0, 1));
    return block;
}

/* crypt_wide does the first `len` bytes, a multiple of eight blocks, and returns the new hash. The
 * hash runs beside the cipher, when sealing eight blocks behind it. Ciphertext waits for it in a
 * copy: memory outside may change at any time. */
INLINE x128 crypt_wide(const gcm_aesni_key *k, const uint32_t rounds, const int opening,
                       uint8_t *out, const uint8_t *in, size_t len, x128 *counter, x128 hash)
{
    uint8_t c[WIDTH * 16]; /* ciphertext, not secret, not wiped */
    x128 s[WIDTH];
    product p;

    for (size_t done = 0; done < len; done += sizeof(c)) {
        const int hashing = opening || done != 0;
        const x128 first = load128(k->round_keys[0]);

        HIDE(k);
        UNROLL for (int i = 0; i < WIDTH; i++) {
            s[i] = _mm_xor_si128(counter_block(counter), first);
        }
        if (opening) {
            UNROLL for (size_t i = 0; i < WIDTH; i++) {
                x128 x = load128(in + done + 16 * i);
                PIN128(x);
                store128(c + 16 * i, x);
            }
        }
        p = no_product();
        UNROLL for (uint32_t r = 1; r < rounds; r++) {
            const x128 round_key = load128(k->round_keys[r]);
            UNROLL for (int i = 0; i < WIDTH; i++) {
                s[i] = _mm_aesenc_si128(s[i], round_key);
            }
            if (hashing && r <= WIDTH) {
                x128 x = reverse128(load128(c + 16 * (r - 1)));
                x = r == 1 ? _mm_xor_si128(x, hash) : x;
                add_product(&p, k, x, WIDTH + 1 - r);
            }
        }
        if (hashing) {
            hash = reduce_product(&p);
        }
        const x128 last = load128(k->round_keys[rounds]);
        UNROLL for (size_t i = 0; i < WIDTH; i++) {
            const x128 x = load128(opening ? c + 16 * i : in + done + 16 * i);
            const x128 y = _mm_xor_si128(_mm_aesenclast_si128(s[i], last), x);
            if (!opening) {
                store128(c + 16 * i, y);
            }
            store128(out + done + 16 * i, y);
        }
    }
    if (!opening && len != 0) {
        p = no_product();
        UNROLL for (size_t i = 0; i < WIDTH; i++) {
            x128 x = reverse128(load128(c + 16 * i));
            x = i == 0 ? _mm_xor_si128(x, hash) : x;
            add_product(&p, k, x, WIDTH - i);
        }
        hash = reduce_product(&p);
    }
    return hash;
}

INLINE x128 crypt_block(const gcm_aesni_key *k, uint32_t rounds, int opening, uint8_t *out,
                        const uint8_t *in, size_t len, x128 *counter, x128 hash)
{
    uint8_t block[16];
    x128 x = len == 16 ? load128(in) : load_part(in, len);

    PIN128(x);
    x128 y = _mm_xor_si128(encrypt128(k->round_keys[0], rounds, counter_block(counter)), x);
    if (len == 16) {
        store128(out, y);
        PIN128(y); /* from here on it is not what `out` holds */
    } else {
        store128(block, y);
        memcpy(out, block, len);
        memset(block + len, 0, 16 - len);
        y = load128(block);
        pye_wipe(block, sizeof(block));
    }
    return absorb_block(k, hash, opening ? x : y);
}

INLINE void crypt_any(const pye_gcm_key *key, const uint32_t rounds, const int opening,
                      uint8_t *out, uint8_t *tag, const uint8_t *iv, const uint8_t *in, size_t len,
                      const uint8_t *aad, size_t aad_len)
{
    const gcm_aesni_key *k = &key->as.aesni;
    const x128 lengths = reverse128(length_block(aad_len, len));
    uint8_t first[16] = {0};

    memcpy(first, iv, PYE_GCM_IV_SIZE); /* not secret, not wiped */
    first[15] = 1;
    x128 counter = reverse128(load128(first));
    const x128 mask = encrypt128(k->round_keys[0], rounds, counter_block(&counter));
    x128 hash = absorb_aad(k, _mm_setzero_si128(), aad, aad_len);
    const size_t whole = len - len % (WIDTH * 16);
    hash = crypt_wide(k, rounds, opening, out, in, whole, &counter, hash);
    in += whole;
    out += whole;
    len -= whole;
    while (len != 0) {
        const size_t take = len < 16 ? len : 16;

        hash = crypt_block(k, rounds, opening, out, in, take, &counter, hash);
        in += take;
        out += take;
        len -= take;
    }
    hash = absorb_block(k, hash, lengths);
    store128(tag, _mm_xor_si128(reverse128(hash), mask));
}

static void seal(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len)
{
    if (key->rounds == 14) {
        crypt_any(key, 14, 0, out, tag, iv, in, len, aad, aad_len);
    } else {
        crypt_any(key, 10, 0, out, tag, iv, in, len, aad, aad_len);
    }
}

static void open(const pye_gcm_key *key, uint8_t *out, uint8_t *tag, const uint8_t *iv,
                 const uint8_t *in, size_t len, const uint8_t *aad, size_t aad_len)
{
    if (key->rounds == 14) {
        crypt_any(key, 14, 1, out, tag, iv, in, len, aad, aad_len);
    } else {
        crypt_any(key, 10, 1, out, tag, iv, in, len, aad, aad_len);
    }
}

static void seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream)
{
    uint8_t iv[PYE_GCM_IV_SIZE];

    (void)stream;
    for (size_t i = 0; i < num_pages; i++) {
        gcm_page_iv(iv, pages[i].version);
        seal(key, pages[i].out, pages[i].tag, iv, pages[i].in, GCM_PAGE_SIZE, pages[i].header,
             GCM_HEADER_SIZE);
    }
}

static void open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages, int stream)
{
    uint8_t iv[PYE_GCM_IV_SIZE];

    (void)stream;
    for (size_t i = 0; i < num_pages; i++) {
        gcm_page_iv(iv, pages[i].version);
        open(key, pages[i].out, pages[i].tag, iv, pages[i].in, GCM_PAGE_SIZE, pages[i].header,
             GCM_HEADER_SIZE);
    }
}

DEFINE_BURN_STACK(x128, 1024)

static void clean(void)
{
    burn_stack();
    gcm_clear_registers();
}

const gcm_implementation pye_gcm_aesni = {
    PYE_GCM_AESNI,
    PYE_CPU_SSSE3 | PYE_CPU_AESNI | PYE_CPU_PCLMUL,
    "aesni",
    init,
    seal,
    open,
    seal_pages,
    open_pages,
    clean,
};
#else
typedef int pye_gcm_aesni_is_for_x86; /* ISO C wants a declaration */
#endif
