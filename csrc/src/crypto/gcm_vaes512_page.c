/* gcm_vaes512_page.c - pages of 4096 bytes under a header of 64: the hot path of paging.
 *
 * - No work is done twice for a key: 261 powers of H give one reduction a page, and the first AES
 *   round of all counters is a table that one XOR adds.
 * - AES and carry-less multiplication use different ports: when sealing, the hash runs one batch
 *   behind the cipher, across the borders of pages; when opening it runs beside it.
 * - The loop over a page is not unrolled: with one load instruction a stride of 512 bytes the
 *   prefetcher follows it (unrolled it reads DRAM at half the rate).
 * - While one page is worked on, the next is fetched from memory, at the same place.
 * - Ciphertext to be hashed stays in registers: memory outside may change at any time. */
#if defined(__x86_64__)
#include "crypto/gcm_vaes512.h"

#define BATCHES 8
#define BLOCKS_A_BATCH 32
/* A page is its header at powers[0 … 3], its data from there on, its lengths at the end. */
#define DATA_INDEX 4

typedef struct {
    x512 base; /* first AES round of the IV with counter zero, four times */
    x128 mask; /* on its way to be the encrypted counter 1, which hides the tag */
    product sum;
} page_state;

INLINE void start_page(page_state *p, const gcm_wide_key *k, const gcm_page *page)
{
    const x128 iv =
        _mm_cvtsi64_si128((long long)__builtin_bswap64(page->version));
    const x128 base = _mm_aesenc_si128(_mm_xor_si128(iv, load128(k->round_keys[0])),
                                       load128(k->round_keys[1]));

    p->base = _mm512_broadcast_i32x4(base);
    p->mask = _mm_xor_si128(base, load128(k->first_tag));
}

/* start_sum begins with the block of lengths and the header. */
INLINE void start_sum(page_state *p, const gcm_wide_key *k, const gcm_page *page, x512 reverse)
{
    const x128 low = load128(k->lengths[0]);
    const x128 high = load128(k->lengths[1]);

    p->sum.low = _mm512_zextsi128_si512(low);
    p->sum.high = _mm512_zextsi128_si512(high);
    p->sum.middle = _mm512_zextsi128_si512(_mm_xor_si128(low, high));
    multiply_add(&p->sum, k, _mm512_shuffle_epi8(load512(page->header), reverse), 0);
}

INLINE void finish_page(const product *sum, x128 mask, uint8_t *tag)
{
    store128(tag, _mm_xor_si128(reverse128(reduce_product(sum)), mask));
}

INLINE void store_vector(uint8_t *out, x512 value, int stream)
{
    if (stream) {
        _mm512_stream_si512((void *)out, value);
    } else {
        _mm512_storeu_si512(out, value);
    }
}

/* seal_batch encrypts batch `b` of a page. If `sum` is given, `c` (the batch before, of this page
 * or the last) is hashed meanwhile, at powers[index]. `c` is then the new ciphertext. */
INLINE void seal_batch(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                       const page_state *p, x128 *mask, x512 c[WIDTH], product *sum, size_t index,
                       uint8_t *out, const uint8_t *in, size_t b, x512 reverse)
{
    x512 s[WIDTH];

    HIDE(k);
    UNROLL for (int i = 0; i < WIDTH; i++) {
        s[i] = _mm512_xor_si512(p->base, load512(k->first[b * BLOCKS_A_BATCH + 4 * (size_t)i]));
    }
    run_rounds(k, s, 2, rounds, mask, sum, c, index, reverse);
    const x512 last = broadcast512(k->round_keys[rounds]);
    if (mask != NULL) {
        *mask = _mm_aesenclast_si128(*mask, _mm512_castsi512_si128(last));
    }
    UNROLL for (int i = 0; i < WIDTH; i++) {
        const x512 x = _mm512_xor_si512(last, load512(in + 64 * i));

        c[i] = _mm512_aesenclast_epi128(s[i], x);
        store_vector(out + 64 * i, c[i], stream);
        PIN512(c[i]); /* from here on it is not what `out` holds */
    }
}

INLINE void seal_run(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                     const gcm_page *pages, size_t num_pages)
{
    const x512 reverse = reverse_mask();
    const gcm_page *page = pages;
    const gcm_page *const end = pages + num_pages;
    page_state p;
    x512 c[WIDTH];
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
        fetch_ahead(next, 64 * WIDTH);
#pragma GCC unroll 1
        for (size_t b = 1; b < BATCHES; b++) {
            in += 64 * WIDTH;
            out += 64 * WIDTH;
            next += 64 * WIDTH;
            fetch_ahead(next, 64 * WIDTH);
            seal_batch(k, rounds, stream, &p, NULL, c, &p.sum,
                       DATA_INDEX + (b - 1) * BLOCKS_A_BATCH, out, in, b, reverse);
        }
        if (page + 1 == end) {
            break;
        }
        /* The first batch of the next page hashes the last one of this page. */
        start_page(&p, k, page + 1);
        mask = p.mask;
        seal_batch(k, rounds, stream, &p, &mask, c, &p.sum,
                   DATA_INDEX + (BATCHES - 1) * BLOCKS_A_BATCH, page[1].out, page[1].in, 0,
                   reverse);
        finish_page(&p.sum, own_mask, page->tag);
        page++;
    }
    UNROLL for (size_t i = 0; i < WIDTH / 2; i++) {
        hash_pair(&p.sum, k, c, i, DATA_INDEX + (BATCHES - 1) * BLOCKS_A_BATCH, reverse);
    }
    finish_page(&p.sum, mask, page->tag);
    if (stream) {
        _mm_sfence();
    }
    clear_registers();
}

/* open_batch reads each vector once: what is hashed is what is decrypted. */
INLINE void open_batch(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                       page_state *p, x128 *mask, uint8_t *out, const uint8_t *in, size_t b,
                       x512 reverse)
{
    x512 s[WIDTH];
    x512 c[WIDTH];

    HIDE(k);
    UNROLL for (int i = 0; i < WIDTH; i++) {
        s[i] = _mm512_xor_si512(p->base, load512(k->first[b * BLOCKS_A_BATCH + 4 * (size_t)i]));
        c[i] = load512(in + 64 * i);
        PIN512(c[i]);
    }
    run_rounds(k, s, 2, rounds, mask, &p->sum, c, DATA_INDEX + b * BLOCKS_A_BATCH, reverse);
    const x512 last = broadcast512(k->round_keys[rounds]);
    if (mask != NULL) {
        *mask = _mm_aesenclast_si128(*mask, _mm512_castsi512_si128(last));
    }
    UNROLL for (int i = 0; i < WIDTH; i++) {
        store_vector(out + 64 * i, _mm512_aesenclast_epi128(s[i], _mm512_xor_si512(last, c[i])),
                     stream);
    }
}

INLINE void open_run(const gcm_wide_key *k, const uint32_t rounds, const int stream,
                     const gcm_page *pages, size_t num_pages)
{
    const x512 reverse = reverse_mask();
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
        fetch_ahead(next, 64 * WIDTH);
        open_batch(k, rounds, stream, &p, &mask, out, in, 0, reverse);
#pragma GCC unroll 1
        for (size_t b = 1; b < BATCHES; b++) {
            in += 64 * WIDTH;
            out += 64 * WIDTH;
            next += 64 * WIDTH;
            fetch_ahead(next, 64 * WIDTH);
            open_batch(k, rounds, stream, &p, NULL, out, in, b, reverse);
        }
        finish_page(&p.sum, mask, page->tag);
    }
    if (stream) {
        _mm_sfence();
    }
    clear_registers();
}

/* AES-128 has rounds 3, 5, 7 and 9 before its last, as many as a batch has pairs to hash. */
_Static_assert(WIDTH / 2 <= 4, "every pair is hashed beside a round");

void pye_gcm_vaes512_seal_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
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

void pye_gcm_vaes512_open_pages(const pye_gcm_key *key, const gcm_page *pages, size_t num_pages,
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
typedef int pye_gcm_vaes512_page_is_for_x86; /* ISO C wants a declaration */
#endif
