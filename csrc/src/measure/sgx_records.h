/* sgx_records.h - the records behind MRENCLAVE, for the files of this folder. */
#ifndef PYE_SRC_MEASURE_SGX_RECORDS_H
#define PYE_SRC_MEASURE_SGX_RECORDS_H

#include "crypto/sha256.h"
#include "pyenclave/measure.h"

#include <string.h>

#define RECORD PYE_SHA256_BLOCK_SIZE
#define CHUNKS (PYE_SGX_PAGE_SIZE / PYE_SGX_CHUNK_SIZE)
#define BLOCKS_A_CHUNK (PYE_SGX_CHUNK_SIZE / PYE_SHA256_BLOCK_SIZE)
/* EADD, then for each chunk EEXTEND and its content. */
#define BLOCKS_A_PAGE (1 + CHUNKS * (1 + BLOCKS_A_CHUNK))
#define NO_CHUNK UINT64_MAX

static const char tag_eadd[8] = {'E', 'A', 'D', 'D', 0, 0, 0, 0};
static const char tag_eextend[8] = {'E', 'E', 'X', 'T', 'E', 'N', 'D', 0};

static inline void store64(uint8_t *p, uint64_t x)
{
    for (size_t i = 0; i < 8; i++) {
        p[i] = (uint8_t)(x >> (8 * i));
    }
}

/* One record: eight bytes of tag, then the words a and b, then zeros. */
static inline void put_record(uint8_t out[RECORD], const char tag[8], uint64_t a, uint64_t b)
{
    memcpy(out, tag, 8);
    store64(out + 8, a);
    store64(out + 16, b);
    memset(out + 24, 0, RECORD - 24);
}

static inline void take_blocks(pye_sgx_measure *ctx, const uint8_t *data, size_t num_blocks)
{
    pye_sha256_blocks(ctx->sha.variant, ctx->sha.h, data, num_blocks);
    ctx->sha.total += num_blocks * PYE_SHA256_BLOCK_SIZE;
}

/* The blocks of measured pages by reference: `records` holds EADD and sixteen EEXTENDs, whose
 * offsets alone differ from page to page; `blocks` points to them and to the content between. */
typedef struct {
    uint8_t records[1 + CHUNKS][RECORD];
    const uint8_t *blocks[BLOCKS_A_PAGE];
} page_stream;

static inline void begin_stream(page_stream *stream, uint64_t flags)
{
    size_t n = 0;

    put_record(stream->records[0], tag_eadd, 0, flags);
    stream->blocks[n++] = stream->records[0];
    for (size_t i = 0; i < CHUNKS; i++) {
        put_record(stream->records[1 + i], tag_eextend, 0, 0);
        stream->blocks[n] = stream->records[1 + i];
        n += 1 + BLOCKS_A_CHUNK;
    }
}

/* Point the stream to one page; its chunk i is at content + i * stride (stride 0: every chunk is the
 * same). */
static inline void point_stream(page_stream *stream, uint64_t offset, const uint8_t *content,
                                size_t stride)
{
    size_t n = 1;

    store64(stream->records[0] + 8, offset);
    for (size_t i = 0; i < CHUNKS; i++) {
        store64(stream->records[1 + i] + 8, offset + i * PYE_SGX_CHUNK_SIZE);
        n++;
        for (size_t j = 0; j < BLOCKS_A_CHUNK; j++) {
            stream->blocks[n++] = content + i * stride + j * PYE_SHA256_BLOCK_SIZE;
        }
    }
}

/* Hash one page. */
static inline void take_page(pye_sgx_measure *ctx, page_stream *stream, uint64_t offset,
                             const uint8_t *content, size_t stride)
{
    point_stream(stream, offset, content, stride);
    pye_sha256_gather(ctx->sha.variant, ctx->sha.h, stream->blocks, BLOCKS_A_PAGE);
    ctx->sha.total += BLOCKS_A_PAGE * PYE_SHA256_BLOCK_SIZE;
}

/* pye_sgx_between_pages tells whether no chunk of the last page is partly done: sixteen or none. */
int pye_sgx_between_pages(const pye_sgx_measure *ctx);
/* pye_sgx_check_pages makes the checks of pye_sgx_add_pages. */
PYE_MUST_USE pye_status pye_sgx_check_pages(const pye_sgx_measure *ctx, uint64_t num_pages,
                                            uint64_t offset, uint64_t flags);
/* pye_sgx_take_unmeasured hashes the EADD records of pages that are not measured. */
void pye_sgx_take_unmeasured(pye_sgx_measure *ctx, size_t num_pages, uint64_t offset,
                             uint64_t flags);

#endif
