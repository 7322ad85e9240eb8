/* gcm_vaes256_page.c - pages of 4096 bytes under a header of 64, with 256-bit vectors.
 *
 * The plan is that of gcm_vaes512_page.c: powers of H for a whole page, the first AES round from a
 * table, the hash one batch behind the cipher and across the borders of pages, the next page fetched
 * meanwhile, and a loop over the page that is not unrolled. */
#if defined(__x86_64__)
#include "crypto/gcm_vaes256.h"

#define BATCHES (GCM_PAGE_SIZE / BATCH)
#define BLOCKS_A_BATCH (BATCH / 16)
/* A page is its header at powers[0 … 3], its data from there on, its lengths at the end. */
#define DATA_INDEX 4

typedef struct {
    x256 base; /* first AES round of the IV with counter zero, twice */
    x128 mask; /* on its way to be the encrypted counter 1, which hides the tag */
    product sum;
} page_state;

INLINE void start_page(page_state *p, const gcm_wide_key *k, const gcm_page *page)
{
    const x128 iv = _mm_cvtsi64_si128((long long)__builtin_bswap64(page->version));
    const x128 base = _mm_aesenc_si128(_mm_xor_si128(iv, load128(k->round_keys[0])),
                                       load128(k->round_keys[1]));

    p->base = _mm256_broadcastsi128_si256(base);
    p->mask = _mm_xor_si128(base, load128(k->first_tag));
}

/* start_sum begins with the block of lengths and the header. */
INLINE void start_sum(page_state *p, const gcm_wide_key *k, const gcm_page *page, x256 reverse)
{
    const x128 low = load128(k->lengths[0]);
    const x128 high = load128(k->lengths[1]);

    p->sum.low = widen(low);
    p->sum.high = widen(high);
    p->sum.middle = widen(_mm_xor_si128(low, high));
    multiply_add(&p->sum, k, _mm256_shuffle_epi8(load256(page->header), reverse), 0);
    multiply_add(&p->sum, k, _mm256_shuffle_epi8(load256(page->header + 32), reverse), 2);
}

INLINE void finish_page(const product *sum, x128 mask, uint8_t *tag)
{
    store128(tag, _mm_xor_si128(reverse128(reduce_product(sum)), mask));
}

INLINE void store_vector(uint8_t *out, x256 value, int stream)
{
    if (stream) {
        _mm256_stream_si256((void *)out, value);
    } else {
        store256(out, value);
    }
}

/* seal_batch encrypts batch `b` of a page. If `sum` is given, `c` (the batch before, of this page
 * or the last) is hashed meanwhile, at powers[index]. `c` is then the new ciphertext. */
INLINE void seal_batch(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                       const page_state *p, x128 *mask, uint8_t c[BATCH], product *sum,
                       size_t index, uint8_t *out, const uint8_t *in, size_t b, x256 reverse)
{
    x256 s[WIDTH];

    HIDE(k);
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        s[i] = _mm256_xor_si256(p->base, load256(k->first[b * BLOCKS_A_BATCH + 2 * i]));
    }
    run_rounds(k, s, rounds, mask, sum, c, index, reverse);
    const x256 last = broadcast256(k->round_keys[rounds]);
    if (mask != NULL) {
        *mask = _mm_aesenclast_si128(*mask, _mm256_castsi256_si128(last));
    }
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        const x256 x = _mm256_xor_si256(last, load256(in + 32 * i));
        const x256 y = _mm256_aesenclast_epi128(s[i], x);

        store_vector(out + 32 * i, y, stream);
        store256(c + 32 * i, y);
    }
}

INLINE void seal_run(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                     const gcm_page *pages, size_t num_pages)
{
    const x256 reverse = reverse_mask();
    const gcm_page *page = pages;
    const gcm_page *const end = pages + num_pages;
    const size_t last_index = DATA_INDEX + (BATCHES - 1) * BLOCKS_A_BATCH;
    _Alignas(32) uint8_t c[BATCH]; /* ciphertext, not secret, not wiped */
    page_state p;
    x128 mask;

    start_page(&p, k, page);
    mask = p.mask;
    seal_batch(k, rounds, stream, &p, &mask, c, NULL, 0, page->out, page->in, 0, reverse);
    for (;;) {
        const uint8_t *in = page->in;
        uint8_t *out = page->out;
        const uint8_t *next = page + 1 == end ? in : page[1].in;
        const x128 own_mask = mask;

        start_sum(&p, k, page, reverse);
        fetch_ahead(next, BATCH);
#pragma GCC unroll 1
        for (size_t b = 1; b < BATCHES; b++) {
            in += BATCH;
            out += BATCH;
            next += BATCH;
            fetch_ahead(next, BATCH);
            seal_batch(k, rounds, stream, &p, NULL, c, &p.sum,
                       DATA_INDEX + (b - 1) * BLOCKS_A_BATCH, out, in, b, reverse);
        }
        if (page + 1 == end) {
            break;
        }
        /* The first batch of the next page hashes the last one of this page. */
        start_page(&p, k, page + 1);
        mask = p.mask;
        seal_batch(k, rounds, stream, &p, &mask, c, &p.sum, last_index, page[1].out, page[1].in,
                   0, reverse);
        finish_page(&p.sum, own_mask, page->tag);
        page++;
    }
    hash_batch(&p.sum, k, c, last_index, reverse);
    finish_page(&p.sum, mask, page->tag);
    if (stream) {
        _mm_sfence();
    }
    _mm256_zeroall();
}

/* open_batch reads each vector once: what is hashed is what is decrypted. */
INLINE void open_batch(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                       page_state *p, x128 *mask, uint8_t *out, const uint8_t *in, size_t b,
                       x256 reverse)
{
    _Alignas(32) uint8_t c[BATCH]; /* ciphertext, not secret, not wiped */
    x256 s[WIDTH];

    HIDE(k);
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        x256 x = load256(in + 32 * i);
        PIN256(x);
        store256(c + 32 * i, x);
    }
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        s[i] = _mm256_xor_si256(p->base, load256(k->first[b * BLOCKS_A_BATCH + 2 * i]));
    }
    run_rounds(k, s, rounds, mask, &p->sum, c, DATA_INDEX + b * BLOCKS_A_BATCH, reverse);
    const x256 last = broadcast256(k->round_keys[rounds]);
    if (mask != NULL) {
        *mask = _mm_aesenclast_si128(*mask, _mm256_castsi256_si128(last));
    }
    UNROLL for (size_t i = 0; i < WIDTH; i++) {
        const x256 x = _mm256_xor_si256(last, load256(c + 32 * i));

        store_vector(out + 32 * i, _mm256_aesenclast_epi128(s[i], x), stream);
    }
}

INLINE void open_run(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                     const gcm_page *pages, size_t num_pages)
{
    const x256 reverse = reverse_mask();
    page_state p;

    for (size_t q = 0; q < num_pages; q++) {
        const gcm_page *page = &pages[q];
        const uint8_t *in = page->in;
        const uint8_t *next = q + 1 == num_pages ? in : page[1].in;
        uint8_t *out = page->out;
        x128 mask;

        start_page(&p, k, page);
        start_sum(&p, k, page, reverse);
        mask = p.mask;
        fetch_ahead(next, BATCH);
        open_batch(k, rounds, stream, &p, &mask, out, in, 0, reverse);
#pragma GCC unroll 1
        for (size_t b = 1; b < BATCHES; b++) {
            in += BATCH;
            out += BATCH;
            next += BATCH;
            fetch_ahead(next, BATCH);
            open_batch(k, rounds, stream, &p, NULL, out, in, b, reverse);
        }
        finish_page(&p.sum, mask, page->tag);
    }
    if (stream) {
        _mm_sfence();
    }
    _mm256_zeroall();
}

void pye_gcm_vaes256_seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream)
{
    const gcm_wide_key *k = &key->as.wide;

    if (key->rounds == 14) {
        if (stream) {
            seal_run(k, 14, 1, pages, num_pages);
        } else {
            seal_run(k, 14, 0, pages, num_pages);
        }
    } else if (stream) {
        seal_run(k, 10, 1, pages, num_pages);
    } else {
        seal_run(k, 10, 0, pages, num_pages);
    }
}

void pye_gcm_vaes256_open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
                                int stream)
{
    const gcm_wide_key *k = &key->as.wide;

    if (key->rounds == 14) {
        if (stream) {
            open_run(k, 14, 1, pages, num_pages);
        } else {
            open_run(k, 14, 0, pages, num_pages);
        }
    } else if (stream) {
        open_run(k, 10, 1, pages, num_pages);
    } else {
        open_run(k, 10, 0, pages, num_pages);
    }
}
#else
typedef int pye_gcm_vaes256_page_is_for_x86; /* ISO C wants a declaration */
#endif
