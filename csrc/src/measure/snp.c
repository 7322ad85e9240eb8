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
    PYE_REFUSE_IF(gpa % PAGE != 0, PYE_E_ALIGNMENT);
    PYE_REFUSE_IF(gpa > END_OF_MEMORY || num_pages > (END_OF_MEMORY - gpa) / PAGE, PYE_E_ARGUMENT);
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

/* Pages that wait until there are enough for all lanes. */
typedef struct {
    uint8_t *out[8];
    const uint8_t *pages[8];
    size_t num;
    size_t lanes; /* 8, 4 or 1 */
} queue;

static void begin_queue(queue *q)
{
    const uint32_t features = pye_cpu_features();

    q->num = 0;
    q->lanes = (features & PYE_CPU_AVX512) ? 8 : (features & PYE_CPU_AVX2) ? 4 : 1;
}

static void hash_queue(queue *q)
{
#if defined(__x86_64__)
    /* From three pages on, eight lanes are faster than one page after the other. */
    if (q->lanes == 8 && q->num >= 3) {
        uint8_t unused[8][PYE_SHA384_SIZE];

        for (size_t i = q->num; i < 8; i++) {
            q->out[i] = unused[i];
            q->pages[i] = q->pages[0];
        }
        pye_sha384_pages_x8_avx512(q->out, q->pages);
        q->num = 0;
    } else if (q->lanes == 4 && q->num == 4) {
        pye_sha384_pages_x4_avx2(q->out, q->pages);
        q->num = 0;
    }
#endif
    for (size_t i = 0; i < q->num; i++) {
        pye_sha384(q->out[i], q->pages[i], PAGE);
    }
    q->num = 0;
}

static void put_page(queue *q, uint8_t *out, const uint8_t *page)
{
    q->out[q->num] = out;
    q->pages[q->num] = page;
    q->num++;
    if (q->num == q->lanes) {
        hash_queue(q);
    }
}

/* A page that repeats its first eight bytes: firmware is full of such padding. */
static int is_uniform(const uint8_t *page)
{
    return memcmp(page, page + 8, 8) == 0 && memcmp(page, page + 8, PAGE - 8) == 0;
}

/* The digest of the uniform page that came last, which is the same for the next ones. */
typedef struct {
    uint8_t word[8];
    uint8_t digest[PYE_SHA384_SIZE];
    int known;
} uniform_page;

static void page_digests(uint8_t *out, const uint8_t *pages, size_t num_pages, uniform_page *last)
{
    queue q;

    begin_queue(&q);
    for (size_t i = 0; i < num_pages; i++) {
        const uint8_t *page = pages + i * PAGE;
        uint8_t *digest = out + i * PYE_SHA384_SIZE;

        if (!is_uniform(page)) {
            put_page(&q, digest, page);
            continue;
        }
        if (!last->known || memcmp(last->word, page, sizeof(last->word)) != 0) {
            memcpy(last->word, page, sizeof(last->word));
            pye_sha384(last->digest, page, PAGE);
            last->known = 1;
        }
        memcpy(digest, last->digest, PYE_SHA384_SIZE);
    }
    hash_queue(&q);
}

void pye_snp_page_digests(uint8_t *out, const uint8_t *pages, size_t num_pages)
{
    uniform_page last = {.known = 0};

    page_digests(out, pages, num_pages, &last);
}

/* PAGE_INFO, padded to the two blocks that it is hashed as. Only the digests and the address
 * change from page to page. */
typedef struct {
    uint8_t bytes[2 * PYE_SHA512_BLOCK_SIZE];
} page_info;

static void begin_info(page_info *info, uint32_t page_type)
{
    memset(info, 0, sizeof(*info));
    info->bytes[96] = PAGE_INFO_SIZE;
    info->bytes[98] = (uint8_t)page_type;
    info->bytes[PAGE_INFO_SIZE] = 0x80;
    info->bytes[sizeof(info->bytes) - 2] = 8 * PAGE_INFO_SIZE >> 8;
    info->bytes[sizeof(info->bytes) - 1] = 8 * PAGE_INFO_SIZE & 0xff;
}

static void link_page(pye_snp_measure *ctx, page_info *info, const uint8_t *contents, uint64_t gpa)
{
    uint64_t h[8];

    memcpy(info->bytes, ctx->digest, PYE_SHA384_SIZE);
    if (contents != NULL) {
        memcpy(info->bytes + PYE_SHA384_SIZE, contents, PYE_SHA384_SIZE);
    }
    for (size_t i = 0; i < 8; i++) {
        info->bytes[104 + i] = (uint8_t)(gpa >> (8 * i));
    }
    memcpy(h, pye_sha384_initial, sizeof(h));
    pye_sha512_blocks(h, info->bytes, 2);
    for (size_t i = 0; i < PYE_SHA384_SIZE; i++) {
        ctx->digest[i] = (uint8_t)(h[i / 8] >> (56 - 8 * (i % 8)));
    }
    ctx->num_pages++;
}

pye_status pye_snp_add_pages(pye_snp_measure *ctx, const uint8_t *pages, size_t num_pages,
                             uint64_t gpa, uint32_t page_type)
{
    pye_status rc;
    page_info info;
    uint8_t digests[BATCH * PYE_SHA384_SIZE];
    uniform_page last = {.known = 0};

    PYE_CHECK(check_range(num_pages, gpa));
    PYE_REQUIRE(page_type == PYE_SNP_NORMAL || page_type == PYE_SNP_VMSA, PYE_E_ARGUMENT);
    begin_info(&info, page_type);
    while (num_pages != 0) {
        const size_t part = num_pages < BATCH ? num_pages : BATCH;

        page_digests(digests, pages, part, &last);
        for (size_t i = 0; i < part; i++) {
            link_page(ctx, &info, digests + i * PYE_SHA384_SIZE, gpa);
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
    page_info info;

    PYE_CHECK(check_range(num_pages, gpa));
    PYE_REQUIRE(page_type >= PYE_SNP_ZERO && page_type <= PYE_SNP_CPUID, PYE_E_ARGUMENT);
    begin_info(&info, page_type);
    for (; num_pages != 0; num_pages--) {
        link_page(ctx, &info, NULL, gpa);
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
    page_info info;
    uint8_t contents[PYE_SHA384_SIZE];

    PYE_CHECK(check_range(1, gpa));
    PYE_REQUIRE(page_type == PYE_SNP_NORMAL || page_type == PYE_SNP_VMSA, PYE_E_ARGUMENT);
    begin_info(&info, page_type);
    pye_sha384(contents, page, PAGE);
    for (; count != 0; count--) {
        link_page(ctx, &info, contents, gpa);
    }
    rc = PYE_OK;
done:
    return rc;
}
