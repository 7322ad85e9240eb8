/* gcm_armv8.c - AES-GCM with AArch64's AESE, AESMC and PMULL (Arm ARM, C7.2), eight blocks at once,
 * one reduction for eight. The arithmetic of GHASH is that of gcm_aesni.c: blocks byte-reversed,
 * one factor times x. */
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("aes"))), apply_to = function)
#else
#pragma GCC target("+crypto")
#endif
#include "crypto/armv8.h"
#include "crypto/gcm_impl.h"

#define WIDTH 8
#define POLYNOMIAL UINT64_C(0xc200000000000000)

typedef struct {
    v128 low;
    v128 high;
    v128 middle;
} product;

INLINE v128 swap128(v128 x)
{
    return vextq_u8(x, x, 8);
}

INLINE v128 reverse128(v128 x)
{
    return swap128(vrev64q_u8(x));
}

INLINE v128 multiply_low(v128 a, v128 b)
{
    return vreinterpretq_u8_p128(vmull_p64(vgetq_lane_p64(vreinterpretq_p64_u8(a), 0),
                                           vgetq_lane_p64(vreinterpretq_p64_u8(b), 0)));
}

INLINE v128 multiply_high(v128 a, v128 b)
{
    return vreinterpretq_u8_p128(
        vmull_high_p64(vreinterpretq_p64_u8(a), vreinterpretq_p64_u8(b)));
}

/* reduce128 folds a product of 256 bits modulo x^128 + x^7 + x^2 + x + 1, bit-reflected, one
 * operand having been multiplied by x (ghash_portable.c says why). */
INLINE v128 reduce128(v128 low, v128 high)
{
    const v128 polynomial = vreinterpretq_u8_u64(vdupq_n_u64(POLYNOMIAL));

    low = veorq_u8(swap128(low), multiply_low(low, polynomial));
    low = veorq_u8(swap128(low), multiply_low(low, polynomial));
    return veorq_u8(low, high);
}

INLINE v128 times_x(v128 h)
{
    const uint64x2_t words = vreinterpretq_u64_u8(h);
    const uint64_t low = vgetq_lane_u64(words, 0);
    const uint64_t high = vgetq_lane_u64(words, 1);
    const uint64_t carry = UINT64_C(0) - (high >> 63);
    const uint64x2_t result =
        vcombine_u64(vcreate_u64((low << 1) ^ (carry & 1)),
                     vcreate_u64(((high << 1) | (low >> 63)) ^ (carry & POLYNOMIAL)));

    return vreinterpretq_u8_u64(result);
}

/* add_product adds x times a power of H; `half` is the sum of the power's halves (Karatsuba). */
INLINE void add_product(product *sum, v128 power, v128 half, v128 x)
{
    sum->low = veorq_u8(sum->low, multiply_low(x, power));
    sum->high = veorq_u8(sum->high, multiply_high(x, power));
    sum->middle = veorq_u8(sum->middle, multiply_low(veorq_u8(x, swap128(x)), half));
}

INLINE product no_product(void)
{
    return (product){vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
}

INLINE v128 reduce_product(const product *p)
{
    const v128 zero = vdupq_n_u8(0);
    const v128 middle = veorq_u8(p->middle, veorq_u8(p->low, p->high));

    return reduce128(veorq_u8(p->low, vextq_u8(zero, middle, 8)),
                     veorq_u8(p->high, vextq_u8(middle, zero, 8)));
}

static void init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len)
{
    gcm_armv8_key *k = &key->as.armv8;

    key->rounds = expand_key(k->round_keys, secret, secret_len);
    const v128 h = times_x(reverse128(encrypt128(k->round_keys[0], key->rounds, vdupq_n_u8(0))));
    const v128 h_half = veorq_u8(h, swap128(h));
    v128 power = h;
    for (int i = WIDTH - 1; i >= 0; i--) {
        store128(k->powers[i], power);
        store128(k->halves[i], veorq_u8(power, swap128(power)));
        product p = no_product();
        add_product(&p, h, h_half, power);
        power = reduce_product(&p);
    }
}

INLINE void add_block(product *sum, const gcm_armv8_key *k, v128 x, size_t exponent)
{
    add_product(sum, load128(k->powers[WIDTH - exponent]), load128(k->halves[WIDTH - exponent]), x);
}

/* absorb_block is the slow way, for what is left over. */
INLINE v128 absorb_block(const gcm_armv8_key *k, v128 hash, v128 block)
{
    product p = no_product();

    add_block(&p, k, veorq_u8(hash, reverse128(block)), 1);
    return reduce_product(&p);
}

/* load_part reads `len` (0 … 15) bytes into a block filled with zeros. */
INLINE v128 load_part(const uint8_t *p, size_t len)
{
    uint8_t block[16] = {0};

    memcpy(block, p, len);
    const v128 x = load128(block);
    pye_wipe(block, sizeof(block));
    return x;
}

INLINE v128 absorb_aad(const gcm_armv8_key *k, v128 hash, const uint8_t *aad, size_t len)
{
    for (; len >= WIDTH * 16; aad += WIDTH * 16, len -= WIDTH * 16) {
        product p = no_product();

        for (size_t i = 0; i < WIDTH; i++) {
            v128 x = reverse128(load128(aad + 16 * i));
            x = i == 0 ? veorq_u8(x, hash) : x;
            add_block(&p, k, x, WIDTH - i);
        }
        hash = reduce_product(&p);
    }
    for (; len >= 16; aad += 16, len -= 16) {
        hash = absorb_block(k, hash, load128(aad));
    }
    return len == 0 ? hash : absorb_block(k, hash, load_part(aad, len));
}

/* The counter is kept with each word's bytes reversed, so that its last word can be counted. */
INLINE v128 counter_block(uint32x4_t *counter)
{
    const v128 block = vrev32q_u8(vreinterpretq_u8_u32(*counter));

    *counter = vaddq_u32(*counter, vsetq_lane_u32(1, vdupq_n_u32(0), 3));
    return block;
}

/* crypt_batch does eight blocks and returns the new hash. The hash runs beside the cipher: when
 * opening over what is read now, else over `c`, the eight blocks before, if there are any (`hashing`).
 * Ciphertext waits in registers: memory outside may change at any time. */
INLINE v128 crypt_batch(const gcm_armv8_key *k, const uint32_t rounds, const int opening,
                        const int hashing, uint8_t *out, const uint8_t *in, v128 c[WIDTH],
                        uint32x4_t *counter, v128 hash)
{
    v128 s[WIDTH];
    product p = no_product();

    HIDE(k);
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        s[i] = counter_block(counter);
        if (opening) {
            c[i] = load128(in + 16 * i);
            PIN128(c[i]);
        }
    }
    UNROLL for (uint32_t r = 0; r < rounds - 1; r++) {
        const v128 round_key = load128(k->round_keys[r]);

        UNROLL for (int i = 0; i < WIDTH; i++) {
            s[i] = vaesmcq_u8(vaeseq_u8(s[i], round_key));
        }
        if (hashing && r < WIDTH) {
            v128 x = reverse128(c[r]);
            x = r == 0 ? veorq_u8(x, hash) : x;
            add_block(&p, k, x, WIDTH - r);
        }
    }
    if (hashing) {
        hash = reduce_product(&p);
    }
    const v128 last = load128(k->round_keys[rounds - 1]);
    const v128 whitening = load128(k->round_keys[rounds]);
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        const v128 x = opening ? c[i] : load128(in + 16 * i);
        v128 y = veorq_u8(veorq_u8(vaeseq_u8(s[i], last), whitening), x);
        store128(out + 16 * i, y);
        if (!opening) {
            PIN128(y); /* from here on it is not what `out` holds */
            c[i] = y;
        }
    }
    return hash;
}

/* crypt_wide does the first `len` bytes, a multiple of eight blocks, and returns the new hash. */
INLINE v128 crypt_wide(const gcm_armv8_key *k, const uint32_t rounds, const int opening,
                       uint8_t *out, const uint8_t *in, size_t len, uint32x4_t *counter, v128 hash)
{
    v128 c[WIDTH]; /* ciphertext, not secret, not wiped */
    size_t done = 0;

    if (len == 0) {
        return hash;
    }
    if (!opening) {
        hash = crypt_batch(k, rounds, 0, 0, out, in, c, counter, hash);
        done = WIDTH * 16;
    }
    for (; done < len; done += WIDTH * 16) {
        hash = crypt_batch(k, rounds, opening, 1, out + done, in + done, c, counter, hash);
    }
    if (!opening) {
        product p = no_product();

        UNROLL for (size_t i = 0; i < WIDTH; i++) {
            v128 x = reverse128(c[i]);
            x = i == 0 ? veorq_u8(x, hash) : x;
            add_block(&p, k, x, WIDTH - i);
        }
        hash = reduce_product(&p);
    }
    return hash;
}

INLINE v128 crypt_block(const gcm_armv8_key *k, uint32_t rounds, int opening, uint8_t *out,
                        const uint8_t *in, size_t len, uint32x4_t *counter, v128 hash)
{
    uint8_t block[16];
    v128 x = len == 16 ? load128(in) : load_part(in, len);

    PIN128(x);
    v128 y = veorq_u8(encrypt128(k->round_keys[0], rounds, counter_block(counter)), x);
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
    const gcm_armv8_key *k = &key->as.armv8;
    uint8_t lengths[16];
    uint8_t first[16] = {0};

    gcm_store_be64(lengths, (uint64_t)aad_len * 8);
    gcm_store_be64(lengths + 8, (uint64_t)len * 8);
    memcpy(first, iv, PYE_GCM_IV_SIZE); /* not secret, not wiped */
    first[15] = 1;
    uint32x4_t counter = vreinterpretq_u32_u8(vrev32q_u8(load128(first)));
    const v128 mask = encrypt128(k->round_keys[0], rounds, counter_block(&counter));
    v128 hash = absorb_aad(k, vdupq_n_u8(0), aad, aad_len);
    const size_t whole = len - len % (WIDTH * 16);
    hash = crypt_wide(k, rounds, opening, out, in, whole, &counter, hash);
    for (size_t done = whole; done < len; done += 16) {
        const size_t take = len - done < 16 ? len - done : 16;

        hash = crypt_block(k, rounds, opening, out + done, in + done, take, &counter, hash);
    }
    hash = absorb_block(k, hash, load128(lengths));
    store128(tag, veorq_u8(reverse128(hash), mask));
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

DEFINE_BURN_STACK(v128, 1024)

static void clean(void)
{
    burn_stack();
    gcm_clear_registers();
}

const gcm_implementation pye_gcm_armv8 = {
    PYE_GCM_ARMV8,
    PYE_CPU_ARM_AES | PYE_CPU_ARM_PMULL,
    "armv8",
    init,
    seal,
    open,
    seal_pages,
    open_pages,
    clean,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pye_gcm_armv8_is_for_aarch64; /* ISO C wants a declaration */
#endif
