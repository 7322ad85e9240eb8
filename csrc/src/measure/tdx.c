/* tdx.c - the one SHA-384 behind MRTD. Its records and chunks are whole blocks, so nothing is ever
 * copied into the hash's own buffer. */
#include "pyenclave/launch.h"

#include "base/check.h"

#include <string.h>

#define PAGE PYE_VM_PAGE_SIZE
#define CHUNK 256
#define RECORD PYE_SHA512_BLOCK_SIZE
#define END_OF_MEMORY ((uint64_t)1 << 52)

static pye_status check_range(uint64_t num_pages, uint64_t gpa)
{
    PYE_REFUSE_IF(gpa % PAGE != 0, PYE_E_ALIGNMENT);
    PYE_REFUSE_IF(gpa > END_OF_MEMORY || num_pages > (END_OF_MEMORY - gpa) / PAGE, PYE_E_ARGUMENT);
    return PYE_OK;
}

static void begin_record(uint8_t record[RECORD], const char *name)
{
    memset(record, 0, RECORD);
    memcpy(record, name, strlen(name));
}

static void take_record(pye_tdx_measure *ctx, uint8_t record[RECORD], uint64_t gpa)
{
    for (size_t i = 0; i < 8; i++) {
        record[16 + i] = (uint8_t)(gpa >> (8 * i));
    }
    pye_sha512_update(&ctx->sha, record, RECORD);
}

void pye_tdx_begin(pye_tdx_measure *ctx)
{
    pye_sha384_init(&ctx->sha);
}

pye_status pye_tdx_add_pages(pye_tdx_measure *ctx, uint64_t num_pages, uint64_t gpa)
{
    pye_status rc;
    uint8_t record[RECORD];

    PYE_CHECK(check_range(num_pages, gpa));
    begin_record(record, "MEM.PAGE.ADD");
    for (; num_pages != 0; num_pages--) {
        take_record(ctx, record, gpa);
        gpa += PAGE;
    }
    rc = PYE_OK;
done:
    return rc;
}

pye_status pye_tdx_extend(pye_tdx_measure *ctx, const uint8_t *pages, size_t num_pages,
                          uint64_t gpa, int add)
{
    pye_status rc;
    uint8_t added[RECORD];
    uint8_t extended[RECORD];

    PYE_CHECK(check_range(num_pages, gpa));
    begin_record(added, "MEM.PAGE.ADD");
    begin_record(extended, "MR.EXTEND");
    for (; num_pages != 0; num_pages--) {
        if (add) {
            take_record(ctx, added, gpa);
        }
        for (size_t at = 0; at < PAGE; at += CHUNK) {
            take_record(ctx, extended, gpa + at);
            pye_sha512_update(&ctx->sha, pages + at, CHUNK);
        }
        pages += PAGE;
        gpa += PAGE;
    }
    rc = PYE_OK;
done:
    return rc;
}

void pye_tdx_digest(const pye_tdx_measure *ctx, uint8_t out[PYE_SHA384_SIZE])
{
    pye_sha512_ctx copy = ctx->sha;

    pye_sha512_final(&copy, out);
}
