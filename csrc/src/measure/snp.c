/* snp.c - the chain of SHA-384 behind an SEV-SNP launch digest.
 *
 * The digests of pages do not depend on each other and are made several at a time; only the links
 * over PAGE_INFO, two blocks each, are serial. */
#include "pyenclave/launch.h"

#include "base/check.h"
#include "crypto/sha512_lanes.h"

#include <string.h>

#define PAGE PYE_VM_PAGE_SIZE
#define END_OF_MEMORY ((uint64_t)1 << 52)
#define PAGE_INFO_SIZE 112
/* Pages hashed before their links are made; their digests lie on the stack. */
#define BATCH 64

static pye_status check_range(uint64_t num_pages, uint64_t gpa)
{
    if (gpa % PAGE != 0) {
        return PYE_E_ALIGNMENT;
    }
    if (gpa > END_OF_MEMORY || num_pages > (END_OF_MEMORY - gpa) / PAGE) {
        return PYE_E_ARGUMENT;
    }
    return PYE_OK;
}

void pye_snp_begin(pye_snp_measure *ctx, const uint8_t *start)
{
    memset(ctx, 0, sizeof(*ctx));
    if (start != NULL) {
        memcpy(ctx->digest, start, sizeof(ctx->digest));
    }
}

const char *pye_snp_variant(void)
{
    const uint32_t features = pye_cpu_features();

    if (features & PYE_CPU_AVX512) {
        return "avx512";
    }
    return (features & PYE_CPU_AVX2) ? "avx2" : "portable";
}

void pye_snp_page_digests(uint8_t *out, const uint8_t *pages, size_t num_pages)
{
#if defined(__x86_64__)
    const uint32_t features = pye_cpu_features();

    for (; (features & PYE_CPU_AVX512) && num_pages >= 8; num_pages -= 8) {
        pye_sha384_pages_x8_avx512(out, pages);
        out += (size_t)8 * PYE_SHA384_SIZE;
        pages += (size_t)8 * PAGE;
    }
    for (; (features & PYE_CPU_AVX2) && num_pages >= 4; num_pages -= 4) {
        pye_sha384_pages_x4_avx2(out, pages);
        out += (size_t)4 * PYE_SHA384_SIZE;
        pages += (size_t)4 * PAGE;
    }
#endif
    for (; num_pages != 0; num_pages--) {
        pye_sha384(out, pages, PAGE);
        out += PYE_SHA384_SIZE;
        pages += PAGE;
    }
}

/* PAGE_INFO but for the digests and the address. */
static void begin_info(uint8_t info[PAGE_INFO_SIZE], uint32_t page_type)
{
    memset(info, 0, PAGE_INFO_SIZE);
    info[96] = PAGE_INFO_SIZE;
    info[98] = (uint8_t)page_type;
}

static void link_page(pye_snp_measure *ctx, uint8_t info[PAGE_INFO_SIZE], const uint8_t *contents,
                      uint64_t gpa)
{
    memcpy(info, ctx->digest, PYE_SHA384_SIZE);
    if (contents != NULL) {
        memcpy(info + PYE_SHA384_SIZE, contents, PYE_SHA384_SIZE);
    }
    for (size_t i = 0; i < 8; i++) {
        info[104 + i] = (uint8_t)(gpa >> (8 * i));
    }
    pye_sha384(ctx->digest, info, PAGE_INFO_SIZE);
    ctx->num_pages++;
}

pye_status pye_snp_add_pages(pye_snp_measure *ctx, const uint8_t *pages, size_t num_pages,
                             uint64_t gpa, uint32_t page_type)
{
    pye_status rc;
    uint8_t info[PAGE_INFO_SIZE];
    uint8_t digests[BATCH * PYE_SHA384_SIZE];

    PYE_CHECK(check_range(num_pages, gpa));
    PYE_REQUIRE(page_type == PYE_SNP_NORMAL || page_type == PYE_SNP_VMSA, PYE_E_ARGUMENT);
    begin_info(info, page_type);
    while (num_pages != 0) {
        const size_t part = num_pages < BATCH ? num_pages : BATCH;

        pye_snp_page_digests(digests, pages, part);
        for (size_t i = 0; i < part; i++) {
            link_page(ctx, info, digests + i * PYE_SHA384_SIZE, gpa);
            gpa += PAGE;
        }
        pages += part * PAGE;
        num_pages -= part;
    }
    rc = PYE_OK;
done:
    return rc;
}

pye_status pye_snp_add_empty(pye_snp_measure *ctx, uint64_t num_pages, uint64_t gpa,
                             uint32_t page_type)
{
    pye_status rc;
    uint8_t info[PAGE_INFO_SIZE];

    PYE_CHECK(check_range(num_pages, gpa));
    PYE_REQUIRE(page_type >= PYE_SNP_ZERO && page_type <= PYE_SNP_CPUID, PYE_E_ARGUMENT);
    begin_info(info, page_type);
    for (; num_pages != 0; num_pages--) {
        link_page(ctx, info, NULL, gpa);
        gpa += PAGE;
    }
    rc = PYE_OK;
done:
    return rc;
}

pye_status pye_snp_add_same(pye_snp_measure *ctx, const uint8_t page[PYE_VM_PAGE_SIZE],
                            uint64_t count, uint64_t gpa, uint32_t page_type)
{
    pye_status rc;
    uint8_t info[PAGE_INFO_SIZE];
    uint8_t contents[PYE_SHA384_SIZE];

    PYE_CHECK(check_range(1, gpa));
    PYE_REQUIRE(page_type == PYE_SNP_NORMAL || page_type == PYE_SNP_VMSA, PYE_E_ARGUMENT);
    begin_info(info, page_type);
    pye_sha384(contents, page, PAGE);
    for (; count != 0; count--) {
        link_page(ctx, info, contents, gpa);
    }
    rc = PYE_OK;
done:
    return rc;
}
