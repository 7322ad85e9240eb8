/* sgx.c - the record stream behind MRENCLAVE.
 *
 * Every record and every chunk is a whole number of SHA-256 blocks, so the hash's own buffer stays
 * empty and the blocks go straight to the block function: the records from a small table on the
 * stack, the content from where it lies. */
#include "pyenclave/measure.h"

#include "base/check.h"
#include "measure/sgx_records.h"

static const char tag_ecreate[8] = {'E', 'C', 'R', 'E', 'A', 'T', 'E', 0};

pye_status pye_sgx_create(pye_sgx_measure *ctx, uint64_t size, uint32_t ssa_frame_size)
{
    pye_status rc;
    uint8_t record[RECORD];

    memset(ctx, 0, sizeof(*ctx));
    PYE_REQUIRE(size >= PYE_SGX_MIN_SIZE && (size & (size - 1)) == 0, PYE_E_LENGTH);
    PYE_REQUIRE(ssa_frame_size != 0, PYE_E_ARGUMENT);
    pye_sha256_init(&ctx->sha);
    ctx->size = size;
    ctx->next_chunk = NO_CHUNK;
    /* The size stands at offset 12, right after a 32-bit frame size. */
    put_record(record, tag_ecreate, ssa_frame_size | size << 32, size >> 32);
    take_blocks(ctx, record, 1);
    rc = PYE_OK;
done:
    return rc;
}

int pye_sgx_between_pages(const pye_sgx_measure *ctx)
{
    return ctx->next_chunk == NO_CHUNK || ctx->next_chunk % PYE_SGX_PAGE_SIZE == 0;
}

static int flags_ok(uint64_t flags)
{
    const uint64_t access = PYE_SGX_R | PYE_SGX_W | PYE_SGX_X;

    if (flags == PYE_SGX_TCS) {
        return 1;
    }
    PYE_REFUSE_IF((flags & ~access) != PYE_SGX_REG, 0);
    return (flags & PYE_SGX_W) == 0 || (flags & PYE_SGX_R) != 0;
}

pye_status pye_sgx_check_pages(const pye_sgx_measure *ctx, uint64_t num_pages, uint64_t offset,
                               uint64_t flags)
{
    PYE_REFUSE_IF(ctx->size == 0 || !pye_sgx_between_pages(ctx), PYE_E_STATE);
    PYE_REFUSE_IF(offset % PYE_SGX_PAGE_SIZE != 0, PYE_E_ALIGNMENT);
    PYE_REFUSE_IF(offset > ctx->size || num_pages > (ctx->size - offset) / PYE_SGX_PAGE_SIZE,
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF(!flags_ok(flags), PYE_E_ARGUMENT);
    return PYE_OK;
}

pye_status pye_sgx_add(pye_sgx_measure *ctx, uint64_t offset, uint64_t flags)
{
    pye_status rc;
    uint8_t record[RECORD];

    PYE_CHECK(pye_sgx_check_pages(ctx, 1, offset, flags));
    put_record(record, tag_eadd, offset, flags);
    take_blocks(ctx, record, 1);
    ctx->next_chunk = offset;
    ctx->num_pages++;
done:
    return rc;
}

pye_status pye_sgx_extend(pye_sgx_measure *ctx, uint64_t offset,
                          const uint8_t chunk[PYE_SGX_CHUNK_SIZE])
{
    pye_status rc;
    uint8_t record[RECORD];

    PYE_REQUIRE(ctx->size != 0 && ctx->next_chunk != NO_CHUNK, PYE_E_STATE);
    PYE_REQUIRE(offset == ctx->next_chunk, PYE_E_STATE);
    put_record(record, tag_eextend, offset, 0);
    take_blocks(ctx, record, 1);
    take_blocks(ctx, chunk, BLOCKS_A_CHUNK);
    offset += PYE_SGX_CHUNK_SIZE;
    ctx->next_chunk = offset % PYE_SGX_PAGE_SIZE == 0 ? NO_CHUNK : offset;
    rc = PYE_OK;
done:
    return rc;
}

void pye_sgx_take_unmeasured(pye_sgx_measure *ctx, size_t num_pages, uint64_t offset,
                             uint64_t flags)
{
    uint8_t records[32][RECORD];

    for (size_t i = 0; i < 32; i++) {
        put_record(records[i], tag_eadd, 0, flags);
    }
    while (num_pages != 0) {
        const size_t part = num_pages < 32 ? num_pages : 32;

        for (size_t i = 0; i < part; i++) {
            store64(records[i] + 8, offset);
            offset += PYE_SGX_PAGE_SIZE;
        }
        take_blocks(ctx, records[0], part);
        num_pages -= part;
    }
}

pye_status pye_sgx_add_pages(pye_sgx_measure *ctx, const uint8_t *pages, size_t num_pages,
                             uint64_t offset, uint64_t flags, int measured)
{
    pye_status rc;
    page_stream stream;

    PYE_CHECK(pye_sgx_check_pages(ctx, num_pages, offset, flags));
    if (measured) {
        begin_stream(&stream, flags);
        for (size_t i = 0; i < num_pages; i++) {
            take_page(ctx, &stream, offset + i * PYE_SGX_PAGE_SIZE, pages + i * PYE_SGX_PAGE_SIZE,
                      PYE_SGX_CHUNK_SIZE);
        }
    } else {
        pye_sgx_take_unmeasured(ctx, num_pages, offset, flags);
    }
    ctx->next_chunk = num_pages != 0 ? NO_CHUNK : ctx->next_chunk;
    ctx->num_pages += num_pages;
done:
    return rc;
}

pye_status pye_sgx_add_filled(pye_sgx_measure *ctx, uint32_t word, size_t num_pages,
                              uint64_t offset, uint64_t flags)
{
    pye_status rc;
    page_stream stream;
    uint8_t chunk[PYE_SGX_CHUNK_SIZE];

    PYE_CHECK(pye_sgx_check_pages(ctx, num_pages, offset, flags));
    for (size_t i = 0; i < sizeof(chunk); i++) {
        chunk[i] = (uint8_t)(word >> (8 * (i % 4)));
    }
    begin_stream(&stream, flags);
    for (size_t i = 0; i < num_pages; i++) {
        take_page(ctx, &stream, offset + i * PYE_SGX_PAGE_SIZE, chunk, 0);
    }
    ctx->next_chunk = num_pages != 0 ? NO_CHUNK : ctx->next_chunk;
    ctx->num_pages += num_pages;
done:
    return rc;
}

pye_status pye_sgx_digest(const pye_sgx_measure *ctx, uint8_t out[PYE_SHA256_SIZE])
{
    pye_status rc;
    pye_sha256_ctx copy;

    PYE_REQUIRE(ctx->size != 0 && pye_sgx_between_pages(ctx), PYE_E_STATE);
    copy = ctx->sha;
    pye_sha256_final(&copy, out);
    rc = PYE_OK;
done:
    if (rc != PYE_OK) {
        memset(out, 0, PYE_SHA256_SIZE);
    }
    return rc;
}
