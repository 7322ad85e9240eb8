/* gcm_vaes512.c - AES-GCM with 512-bit VAES and VPCLMULQDQ: key set-up and messages of any length.
 * Pages are in gcm_vaes512_page.c. Drucker, Gueron and Krasnov, "Making AES great again" (2018). */
#if defined(__x86_64__)
#include "crypto/gcm_vaes512.h"

/* Bytes over which one reduction is made: 256 blocks, one less than the powers allow for. */
#define CHUNK ((size_t)4096)
#define BATCH ((size_t)WIDTH * 64)

static void init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len)
{
    gcm_wide_key *k = &key->as.wide;
    const x128 zero = _mm_setzero_si128();
    x128 low;
    x128 high;

    memset(k, 0, sizeof(*k));
    key->rounds = expand_key(k->round_keys, secret, secret_len);
    const x128 h = times_x(reverse128(encrypt128(k->round_keys[0], key->rounds, zero)));

    /* H^1 … H^4 one after the other, then four at a time */
    x128 p[4] = {h, zero, zero, zero};
    for (int i = 1; i < 4; i++) {
        multiply128(p[i - 1], h, &low, &high);
        p[i] = reduce128(low, high);
    }
    const x512 step = _mm512_broadcast_i32x4(p[3]);
    const x512 polynomial =
        _mm512_broadcast_i32x4(_mm_set_epi64x(0, (long long)0xc200000000000000u));
    x512 x = _mm512_inserti32x4(_mm512_castsi128_si512(p[3]), p[2], 1);
    x = _mm512_inserti32x4(_mm512_inserti32x4(x, p[1], 2), p[0], 3);
    for (size_t i = GCM_PAGE_BLOCKS - 4;; i -= 4) {
        _mm512_storeu_si512(k->powers[i], x);
        _mm512_storeu_si512(k->halves[i],
                            _mm512_xor_si512(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x4e)));
        if (i < 4) {
            break;
        }
        const x512 middle = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, step, 0x10),
                                             _mm512_clmulepi64_epi128(x, step, 0x01));
        x512 l = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, step, 0x00),
                                  _mm512_bslli_epi128(middle, 8));
        const x512 u = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, step, 0x11),
                                        _mm512_bsrli_epi128(middle, 8));
        for (int fold = 0; fold < 2; fold++) {
            l = _mm512_xor_si512(_mm512_shuffle_epi32(l, (_MM_PERM_ENUM)0x4e),
                                 _mm512_clmulepi64_epi128(l, polynomial, 0x00));
        }
        x = _mm512_xor_si512(l, u);
    }
    /* 261 = 4 · 65 + 1: the highest power stands alone */
    const x128 second = load128(k->powers[1]);
    multiply128(second, h, &low, &high);
    const x128 highest = reduce128(low, high);
    store128(k->powers[0], highest);
    store128(k->halves[0], _mm_xor_si128(highest, swap128(highest)));

    make_tables(k, h);
    clear_registers();
}

/* How many bytes of vector `i` are there, as a mask for loads and stores. */
INLINE __mmask64 part_mask(size_t len, size_t i)
{
    const size_t start = 64 * i;

    if (len >= start + 64) {
        return ~(__mmask64)0;
    }
    return len <= start ? 0 : ((__mmask64)1 << (len - start)) - 1;
}

/* absorb adds `len` bytes; the first block has powers[index]. `*hash`, reduced before, is added to
 * the first block and becomes zero. */
INLINE void absorb(product *sum, const gcm_wide_key *k, x128 *hash, const uint8_t *data,
                   size_t len, size_t index)
{
    for (size_t done = 0; done < len; done += 64, index += 4) {
        const x512 block = _mm512_maskz_loadu_epi8(part_mask(len - done, 0), data + done);
        const x512 x = _mm512_xor_si512(_mm512_shuffle_epi8(block, reverse_mask()),
                                        _mm512_zextsi128_si512(*hash));

        *hash = _mm_setzero_si128();
        multiply_add(sum, k, x, index);
    }
}

typedef struct {
    const gcm_wide_key *k;
    x128 iv; /* the counter block of counter zero */
    product sum;
    x128 hash; /* what was reduced already, byte-reversed; to be added to the next block */
} message;

/* index_at gives the place among the powers for the block at byte `at` of a message of `len`. */
INLINE size_t index_at(size_t at, size_t len)
{
    const size_t left = len - (at - at % CHUNK);
    /* the last chunk leaves H^1 to the block of lengths */
    const size_t start = left > CHUNK ? GCM_PAGE_BLOCKS - 256
                                      : GCM_PAGE_BLOCKS - 1 - (left + 15) / 16;

    return start + at % CHUNK / 16;
}

/* first_round gives the first AES round of counter `upper` · 256, four times. */
INLINE x512 first_round(const message *m, size_t upper)
{
    const x128 block =
        _mm_insert_epi32(m->iv, (int)__builtin_bswap32((uint32_t)(upper << 8)), 3);
    const x128 white = _mm_xor_si128(block, load128(m->k->round_keys[0]));

    return _mm512_broadcast_i32x4(_mm_aesenc_si128(white, load128(m->k->round_keys[1])));
}

/* start_batch gives the state after the first round of the batch at byte `at`: by tables, as for
 * pages (gcm_vaes512_page.c). `*base` is that of the chunk, which has one upper part of the counter
 * but in its last two blocks: counters 256 q + 2 … 256 q + 257. */
INLINE void start_batch(const message *m, x512 s[WIDTH], x512 *base, size_t at)
{
    const size_t block = at % CHUNK / 16;

    if (block == 0) {
        *base = first_round(m, at / CHUNK);
    }
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        s[i] = _mm512_xor_si512(*base, load512(m->k->first[block + 4 * i]));
    }
    if (block == (CHUNK - BATCH) / 16) {
        const x512 next = first_round(m, at / CHUNK + 1);
        s[WIDTH - 1] =
            _mm512_xor_si512(_mm512_mask_blend_epi64(0xf0, *base, next), load512(m->k->wrap));
    }
}

/* take_hash adds what was reduced to the first block of a batch. */
INLINE void take_hash(message *m, x512 c[WIDTH])
{
    c[0] = _mm512_xor_si512(c[0], _mm512_zextsi128_si512(reverse128(m->hash)));
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
    const x512 reverse = reverse_mask();
    x512 s[WIDTH];
    x512 c[WIDTH]; /* the ciphertext to be hashed next */
    x512 base = _mm512_setzero_si512();

    UNROLL for (int i = 0; i < WIDTH; i++) {
        c[i] = _mm512_setzero_si512();
    }
    for (size_t at = 0; at < whole; at += BATCH) {
        const gcm_wide_key *k = m->k;
        x512 x[WIDTH];

        HIDE(k);
        start_batch(m, s, &base, at);
        if (opening) {
            UNROLL for (size_t i = 0; i < WIDTH; i++) {
                x[i] = load512(in + at + 64 * i);
                PIN512(x[i]);
                c[i] = x[i];
            }
            take_hash(m, c);
            run_rounds(k, s, 2, rounds, NULL, &m->sum, c, index_at(at, len), reverse);
            after_batch(m, at + BATCH, len);
        } else if (at == 0) {
            run_rounds(k, s, 2, rounds, NULL, NULL, NULL, 0, reverse);
        } else {
            take_hash(m, c);
            run_rounds(k, s, 2, rounds, NULL, &m->sum, c, index_at(at - BATCH, len), reverse);
            after_batch(m, at, len);
        }
        const x512 last = broadcast512(k->round_keys[rounds]);
        UNROLL for (size_t i = 0; i < WIDTH; i++) {
            if (!opening) {
                x[i] = load512(in + at + 64 * i);
            }
            const x512 y = _mm512_aesenclast_epi128(s[i], _mm512_xor_si512(last, x[i]));
            _mm512_storeu_si512(out + at + 64 * i, y);
            if (!opening) {
                c[i] = y;
                PIN512(c[i]);
            }
        }
    }
    if (!opening && whole != 0) {
        take_hash(m, c);
        UNROLL for (size_t i = 0; i < WIDTH / 2; i++) {
            hash_pair(&m->sum, m->k, c, i, index_at(whole - BATCH, len), reverse);
        }
        after_batch(m, whole, len);
    }
}

/* last_batch does the `len` bytes that are left after `done`, in `width` vectors. */
INLINE void last_batch(message *m, const uint32_t rounds, const int width, const int opening,
                       uint8_t *out, const uint8_t *in, size_t len, size_t done, size_t index)
{
    const x512 reverse = reverse_mask();
    const x512 white = broadcast512(m->k->round_keys[0]);
    const x512 four = _mm512_broadcast_i32x4(_mm_set_epi32(0, 0, 0, 4));
    const x128 counter = _mm_insert_epi32(reverse128(m->iv), (int)(2 + done / 16), 0);
    x512 counters = _mm512_add_epi32(_mm512_broadcast_i32x4(counter),
                                     _mm512_set_epi32(0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0,
                                                      0));
    x512 s[WIDTH];

    UNROLL for (int i = 0; i < width; i++) {
        s[i] = _mm512_xor_si512(_mm512_shuffle_epi8(counters, reverse), white);
        counters = _mm512_add_epi32(counters, four);
    }
    UNROLL for (uint32_t r = 1; r < rounds; r++) {
        const x512 round_key = broadcast512(m->k->round_keys[r]);
        UNROLL for (int i = 0; i < width; i++) {
            s[i] = _mm512_aesenc_epi128(s[i], round_key);
        }
    }
    const x512 last = broadcast512(m->k->round_keys[rounds]);
    UNROLL for (int i = 0; i < width; i++) {
        const size_t at = 64 * (size_t)i;
        const __mmask64 mask = part_mask(len, (size_t)i);
        if (mask == 0) {
            break; /* the index would lie beyond the powers */
        }
        x512 x = _mm512_maskz_loadu_epi8(mask, in + at);
        PIN512(x);
        const x512 y =
            _mm512_maskz_mov_epi8(mask, _mm512_aesenclast_epi128(s[i], _mm512_xor_si512(last, x)));
        _mm512_mask_storeu_epi8(out + at, mask, y);
        const x512 c = _mm512_shuffle_epi8(opening ? x : y, reverse);
        multiply_add(&m->sum, m->k, _mm512_xor_si512(c, _mm512_zextsi128_si512(m->hash)),
                     index + 4 * (size_t)i);
        m->hash = _mm_setzero_si128();
    }
}

INLINE void crypt_any(const pye_gcm_key *key, const uint32_t rounds, const int opening,
                      uint8_t *out, uint8_t *tag, const uint8_t *iv, const uint8_t *in, size_t len,
                      const uint8_t *aad, size_t aad_len)
{
    const gcm_wide_key *k = &key->as.wide;
    const x128 lengths = length_block(aad_len, len);
    const x128 zero_counter = _mm_maskz_loadu_epi8(0xfff, iv);
    const x128 first = _mm_insert_epi32(zero_counter, 0x01000000, 3);
    const size_t data_blocks = len / 16 + (len % 16 != 0);
    const size_t aad_blocks = aad_len / 16 + (aad_len % 16 != 0);
    message m = {k, zero_counter, no_product(), _mm_setzero_si128()};

    x128 mask = _mm_xor_si128(first, load128(k->round_keys[0]));
    UNROLL for (uint32_t r = 1; r < rounds; r++) {
        mask = _mm_aesenc_si128(mask, load128(k->round_keys[r]));
    }
    mask = _mm_aesenclast_si128(mask, load128(k->round_keys[rounds]));

    /* A short message is one polynomial with one reduction. */
    if (aad_blocks < GCM_PAGE_BLOCKS && data_blocks < GCM_PAGE_BLOCKS - aad_blocks &&
        len <= CHUNK) {
        absorb(&m.sum, k, &m.hash, aad, aad_len, GCM_PAGE_BLOCKS - 1 - data_blocks - aad_blocks);
    } else {
        while (aad_len != 0) {
            const size_t take = aad_len < CHUNK ? aad_len : CHUNK;

            absorb(&m.sum, k, &m.hash, aad, take, GCM_PAGE_BLOCKS - (take + 15) / 16);
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
    } else if (left != 0) {
        last_batch(&m, rounds, WIDTH / 2, opening, out + whole, in + whole, left, whole,
                   index_at(whole, len));
    }
    const x512 end = _mm512_zextsi128_si512(_mm_xor_si128(lengths, m.hash));
    multiply_add(&m.sum, k, end, GCM_PAGE_BLOCKS - 1);
    store128(tag, _mm_xor_si128(reverse128(reduce_product(&m.sum)), mask));
    clear_registers();
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

DEFINE_BURN_STACK(x512, 1024)

const gcm_implementation pye_gcm_vaes512 = {
    PYE_GCM_VAES512,
    PYE_CPU_SSSE3 | PYE_CPU_AESNI | PYE_CPU_PCLMUL | PYE_CPU_AVX | PYE_CPU_AVX2 | PYE_CPU_AVX512 |
        PYE_CPU_VAES | PYE_CPU_VPCLMUL,
    "vaes512",
    init,
    seal,
    open,
    pye_gcm_vaes512_seal_pages,
    pye_gcm_vaes512_open_pages,
    burn_stack,
};
#else
typedef int pye_gcm_vaes512_is_for_x86; /* ISO C wants a declaration */
#endif
