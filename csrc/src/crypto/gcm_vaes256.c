/* gcm_vaes256.c - AES-GCM with 256-bit VAES and VPCLMULQDQ, no AVX-512: key set-up and messages of
 * any length. Pages are in gcm_vaes256_page.c; the tables are those of gcm_vaes512.c. */
#if defined(__x86_64__)
#include "crypto/gcm_vaes256.h"

/* Bytes over which one reduction is made: 256 blocks, one less than the powers allow for. */
#define CHUNK ((size_t)4096)

static void init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len)
{
    gcm_wide_key *k = &key->as.wide;
    x128 low;
    x128 high;

    memset(k, 0, sizeof(*k));
    key->rounds = expand_key(k->round_keys, secret, secret_len);
    const x128 h =
        times_x(reverse128(encrypt128(k->round_keys[0], key->rounds, _mm_setzero_si128())));

    /* H^2 and H^1, then two at a time */
    multiply128(h, h, &low, &high);
    const x128 square = reduce128(low, high);
    const x256 step = _mm256_broadcastsi128_si256(square);
    const x256 polynomial =
        _mm256_broadcastsi128_si256(_mm_set_epi64x(0, (long long)0xc200000000000000u));
    x256 x = _mm256_inserti128_si256(widen(square), h, 1);
    for (size_t i = GCM_PAGE_BLOCKS - 2;; i -= 2) {
        store256(k->powers[i], x);
        store256(k->halves[i], _mm256_xor_si256(x, _mm256_shuffle_epi32(x, 0x4e)));
        if (i < 2) {
            break;
        }
        const x256 middle = _mm256_xor_si256(_mm256_clmulepi64_epi128(x, step, 0x10),
                                             _mm256_clmulepi64_epi128(x, step, 0x01));
        x256 l = _mm256_xor_si256(_mm256_clmulepi64_epi128(x, step, 0x00),
                                  _mm256_bslli_epi128(middle, 8));
        const x256 u = _mm256_xor_si256(_mm256_clmulepi64_epi128(x, step, 0x11),
                                        _mm256_bsrli_epi128(middle, 8));
        for (int fold = 0; fold < 2; fold++) {
            l = _mm256_xor_si256(_mm256_shuffle_epi32(l, 0x4e),
                                 _mm256_clmulepi64_epi128(l, polynomial, 0x00));
        }
        x = _mm256_xor_si256(l, u);
    }
    /* 261 = 2 · 130 + 1: the highest power stands alone */
    multiply128(load128(k->powers[1]), h, &low, &high);
    const x128 highest = reduce128(low, high);
    store128(k->powers[0], highest);
    store128(k->halves[0], _mm_xor_si128(highest, swap128(highest)));
    make_tables(k, h);
    _mm256_zeroall();
}

typedef struct {
    const gcm_wide_key *k;
    x128 iv; /* the counter block of counter zero */
    product sum;
    x128 hash; /* what was reduced already, byte-reversed; to be added to the next block */
} message;

/* absorb_vector adds two blocks, and to the first of them what was reduced before. */
INLINE void absorb_vector(message *m, x256 block, size_t index, x256 reverse)
{
    const x256 x = _mm256_xor_si256(_mm256_shuffle_epi8(block, reverse), widen(m->hash));

    m->hash = _mm_setzero_si128();
    multiply_add(&m->sum, m->k, x, index);
}

/* absorb adds `len` bytes of additional data; the first block has powers[index]. */
INLINE void absorb(message *m, const uint8_t *data, size_t len, size_t index)
{
    const x256 reverse = reverse_mask();

    for (; len >= 32; data += 32, len -= 32, index += 2) {
        absorb_vector(m, load256(data), index, reverse);
    }
    if (len != 0) {
        _Alignas(32) uint8_t part[32] = {0}; /* additional data, not secret, not wiped */

        memcpy(part, data, len);
        absorb_vector(m, load256(part), index, reverse);
    }
}

/* index_at gives the place among the powers for the block at byte `at` of a message of `len`. */
INLINE size_t index_at(size_t at, size_t len)
{
    const size_t left = len - (at - at % CHUNK);
    /* the last chunk leaves H^1 to the block of lengths */
    const size_t start = left > CHUNK ? GCM_PAGE_BLOCKS - 256
                                      : GCM_PAGE_BLOCKS - 1 - (left + 15) / 16;

    return start + at % CHUNK / 16;
}

/* first_round gives the first AES round of counter `upper` · 256, twice. */
INLINE x256 first_round(const message *m, size_t upper)
{
    const x128 block =
        _mm_insert_epi32(m->iv, (int)__builtin_bswap32((uint32_t)(upper << 8)), 3);
    const x128 white = _mm_xor_si128(block, load128(m->k->round_keys[0]));

    return _mm256_broadcastsi128_si256(_mm_aesenc_si128(white, load128(m->k->round_keys[1])));
}

/* start_batch gives the state after the first round of the batch at byte `at`: by tables, as for
 * pages. A chunk has one upper part of the counter but in its last two blocks, which are one
 * vector: counters 256 q + 2 … 256 q + 257. */
INLINE void start_batch(const message *m, x256 s[WIDTH], size_t at)
{
    const size_t block = at % CHUNK / 16;
    const x256 base = first_round(m, at / CHUNK);

    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        s[i] = _mm256_xor_si256(base, load256(m->k->first[block + 2 * i]));
    }
    if (block == (CHUNK - BATCH) / 16) {
        s[WIDTH - 1] =
            _mm256_xor_si256(first_round(m, at / CHUNK + 1), load256(m->k->wrap[2]));
    }
}

/* take_hash adds what was reduced to the first block of a batch. */
INLINE void take_hash(message *m, uint8_t c[BATCH])
{
    store128(c, _mm_xor_si128(load128(c), reverse128(m->hash)));
    m->hash = _mm_setzero_si128();
}

/* after_batch reduces at the end of each chunk but the last; `end` is where the batch ended. */
INLINE void after_batch(message *m, size_t end, size_t len)
{
    if (end % CHUNK == 0 && end < len) {
        m->hash = reduce_product(&m->sum);
        m->sum = no_product();
    }
}

/* whole_batches does the first `whole` bytes of a message, a multiple of BATCH: cipher and hash run
 * side by side, when sealing the hash one batch behind. */
INLINE void whole_batches(message *m, const uint32_t rounds, const int opening, uint8_t *out,
                          const uint8_t *in, size_t whole, size_t len)
{
    const x256 reverse = reverse_mask();
    /* Ciphertext to be hashed and, when opening, decrypted; its first block may have the hash of
     * what came before added to it, which is wiped with it. */
    _Alignas(32) uint8_t c[BATCH];
    _Alignas(32) uint8_t x[BATCH];

    if (whole == 0) {
        return;
    }
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        store256(c + 32 * i, _mm256_setzero_si256());
    }
    for (size_t at = 0; at < whole; at += BATCH) {
        const gcm_wide_key *k = m->k;
        x256 s[WIDTH];

        HIDE(k);
        if (opening) {
            UNROLL for (size_t i = 0; i < WIDTH; i++) {
                x256 y = load256(in + at + 32 * i);
                PIN256(y);
                store256(c + 32 * i, y);
                store256(x + 32 * i, y);
            }
        }
        start_batch(m, s, at);
        if (opening) {
            take_hash(m, c);
            run_rounds(k, s, rounds, NULL, &m->sum, c, index_at(at, len), reverse);
            after_batch(m, at + BATCH, len);
        } else if (at == 0) {
            run_rounds(k, s, rounds, NULL, NULL, NULL, 0, reverse);
        } else {
            take_hash(m, c);
            run_rounds(k, s, rounds, NULL, &m->sum, c, index_at(at - BATCH, len), reverse);
            after_batch(m, at, len);
        }
        const x256 last = broadcast256(k->round_keys[rounds]);
        UNROLL for (size_t i = 0; i < WIDTH; i++) {
            const x256 from = load256(opening ? x + 32 * i : in + at + 32 * i);
            const x256 y = _mm256_aesenclast_epi128(s[i], _mm256_xor_si256(last, from));

            store256(out + at + 32 * i, y);
            if (!opening) {
                store256(c + 32 * i, y);
            }
        }
    }
    if (!opening) {
        take_hash(m, c);
        hash_batch(&m->sum, m->k, c, index_at(whole - BATCH, len), reverse);
        after_batch(m, whole, len);
    }
    store128(c, _mm_setzero_si128());
    __asm__ volatile("" : : "r"(c) : "memory"); /* the store stays */
}

/* last_batch does the `len` bytes that are left after `done`, in `width` vectors. They are copied
 * in and out: there are no masked loads of bytes here, and memory outside may change. */
INLINE void last_batch(message *m, const uint32_t rounds, const int width, const int opening,
                       uint8_t *out, const uint8_t *in, size_t len, size_t done, size_t index)
{
    const x256 reverse = reverse_mask();
    const x256 white = broadcast256(m->k->round_keys[0]);
    const x256 two = _mm256_set_epi32(0, 0, 0, 2, 0, 0, 0, 2);
    const x128 counter = _mm_insert_epi32(reverse128(m->iv), (int)(2 + done / 16), 0);
    x256 counters = _mm256_add_epi32(_mm256_broadcastsi128_si256(counter),
                                     _mm256_set_epi32(0, 0, 0, 1, 0, 0, 0, 0));
    _Alignas(32) uint8_t part[BATCH];
    x256 s[WIDTH];

    UNROLL for (int i = 0; i < width; i++) {
        store256(part + 32 * i, _mm256_setzero_si256());
    }
    memcpy(part, in, len);
    UNROLL for (int i = 0; i < width; i++) {
        s[i] = _mm256_xor_si256(_mm256_shuffle_epi8(counters, reverse), white);
        counters = _mm256_add_epi32(counters, two);
    }
    UNROLL for (uint32_t r = 1; r < rounds; r++) {
        const x256 round_key = broadcast256(m->k->round_keys[r]);
        UNROLL for (int i = 0; i < width; i++) {
            s[i] = _mm256_aesenc_epi128(s[i], round_key);
        }
    }
    const x256 last = broadcast256(m->k->round_keys[rounds]);
    if (opening) {
        for (size_t at = 0; at < len; at += 32) {
            absorb_vector(m, load256(part + at), index + at / 16, reverse);
        }
    }
    UNROLL for (int i = 0; i < width; i++) {
        const x256 x = _mm256_xor_si256(last, load256(part + 32 * i));
        store256(part + 32 * i, _mm256_aesenclast_epi128(s[i], x));
    }
    memcpy(out, part, len);
    if (!opening) {
        /* key stream past the end is not part of the message */
        memset(part + len, 0, 32 * (size_t)width - len);
        for (size_t at = 0; at < len; at += 32) {
            absorb_vector(m, load256(part + at), index + at / 16, reverse);
        }
    }
    UNROLL for (int i = 0; i < width; i++) {
        store256(part + 32 * i, _mm256_setzero_si256());
    }
    __asm__ volatile("" : : "r"(part) : "memory"); /* the stores stay */
}

INLINE void crypt_any(const pye_gcm_key *key, const uint32_t rounds, const int opening,
                      uint8_t *out, uint8_t *tag, const uint8_t *iv, const uint8_t *in, size_t len,
                      const uint8_t *aad, size_t aad_len)
{
    const gcm_wide_key *k = &key->as.wide;
    const x128 lengths = length_block(aad_len, len);
    uint8_t iv_block[16] = {0}; /* not secret, not wiped */
    const size_t data_blocks = len / 16 + (len % 16 != 0);
    const size_t aad_blocks = aad_len / 16 + (aad_len % 16 != 0);

    memcpy(iv_block, iv, PYE_GCM_IV_SIZE);
    message m = {k, load128(iv_block), no_product(), _mm_setzero_si128()};
    const x128 first = _mm_insert_epi32(m.iv, 0x01000000, 3);

    /* A short message is one polynomial with one reduction. */
    if (aad_blocks < GCM_PAGE_BLOCKS && data_blocks < GCM_PAGE_BLOCKS - aad_blocks &&
        len <= CHUNK) {
        absorb(&m, aad, aad_len, GCM_PAGE_BLOCKS - 1 - data_blocks - aad_blocks);
    } else {
        while (aad_len != 0) {
            const size_t take = aad_len < CHUNK ? aad_len : CHUNK;

            absorb(&m, aad, take, GCM_PAGE_BLOCKS - (take + 15) / 16);
            m.hash = reduce_product(&m.sum);
            m.sum = no_product();
            aad += take;
            aad_len -= take;
        }
    }
    const size_t whole = len - len % BATCH;
    const size_t left = len - whole;
    whole_batches(&m, rounds, opening, out, in, whole, len);
    if (left > BATCH / 2) {
        last_batch(&m, rounds, WIDTH, opening, out + whole, in + whole, left, whole,
                   index_at(whole, len));
    } else if (left > BATCH / 4) {
        last_batch(&m, rounds, WIDTH / 2, opening, out + whole, in + whole, left, whole,
                   index_at(whole, len));
    } else if (left != 0) {
        last_batch(&m, rounds, WIDTH / 4, opening, out + whole, in + whole, left, whole,
                   index_at(whole, len));
    }
    multiply_add(&m.sum, k, widen(_mm_xor_si128(lengths, m.hash)), GCM_PAGE_BLOCKS - 1);
    const x128 mask = encrypt128(k->round_keys[0], rounds, first);
    store128(tag, _mm_xor_si128(reverse128(reduce_product(&m.sum)), mask));
    _mm256_zeroall();
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

DEFINE_BURN_STACK(x256, 2560)

static void clean(void)
{
    burn_stack();
    gcm_clear_registers(); /* memcpy may have used wider ones */
}

const gcm_implementation pye_gcm_vaes256 = {
    PYE_GCM_VAES256,
    PYE_CPU_SSSE3 | PYE_CPU_AESNI | PYE_CPU_PCLMUL | PYE_CPU_AVX | PYE_CPU_AVX2 | PYE_CPU_VAES |
        PYE_CPU_VPCLMUL,
    "vaes256",
    init,
    seal,
    open,
    pye_gcm_vaes256_seal_pages,
    pye_gcm_vaes256_open_pages,
    clean,
};
#else
typedef int pye_gcm_vaes256_is_for_x86; /* ISO C wants a declaration */
#endif
