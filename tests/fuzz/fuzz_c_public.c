/* fuzz_c_public.c - what is computed of public bytes: -DFUZZ_LAUNCH (measurements of virtual
 * machines), -DFUZZ_P256 (signatures). docs/fuzzing.md. */
#include "fuzz_c.h"

#if defined(FUZZ_LAUNCH)
#include "pyenclave/launch.h"

enum { PAGE = PYE_VM_PAGE_SIZE, MOST = 40 };

/* What the header lets a caller ask for. */
static pye_status may(uint64_t num, uint64_t gpa)
{
    const uint64_t end = UINT64_C(1) << 52;

    return gpa % PAGE != 0                         ? PYE_E_ALIGNMENT
           : gpa > end || num > (end - gpa) / PAGE ? PYE_E_ARGUMENT
                                                   : PYE_OK;
}

/* The same twice: as it was asked for, and page by page. */
static struct {
    pye_snp_measure snp;
    pye_tdx_measure tdx;
} whole, single;

static void snp(fuzz_input *input, const uint8_t *pages, uint64_t num, uint64_t gpa)
{
    const uint32_t type = (uint32_t)fuzz_take(input, 1) % 9;
    const uint64_t how = fuzz_take(input, 1) % 3;
    const int filled = type == PYE_SNP_NORMAL || type == PYE_SNP_VMSA;
    const int empty = type >= PYE_SNP_ZERO && type <= PYE_SNP_CPUID;
    const pye_status range = may(how == 2 ? 1 : num, gpa);
    pye_status rc;

    if (how == 0) {
        rc = pye_snp_add_pages(&whole.snp, pages, (size_t)num, gpa, type);
    } else if (how == 1) {
        rc = pye_snp_add_empty(&whole.snp, num, gpa, type);
    } else if (num < MOST) {
        rc = pye_snp_add_same(&whole.snp, pages, num, gpa, type);
    } else {
        return; /* any number of times is meant */
    }
    FUZZ_CHECK(rc == (range != PYE_OK               ? range
                      : (how == 1 ? empty : filled) ? PYE_OK
                                                    : PYE_E_ARGUMENT),
               "accepted or refused against the header");
    for (uint64_t i = 0; rc == PYE_OK && i < num; i++) {
        const uint64_t at = how == 2 ? 0 : i;
        FUZZ_CHECK((how == 1 ? pye_snp_add_empty(&single.snp, 1, gpa + at * PAGE, type)
                             : pye_snp_add_pages(&single.snp, pages + at * PAGE, 1,
                                                 gpa + at * PAGE, type)) == PYE_OK,
                   "one page of those that were accepted");
    }
}

static void tdx(fuzz_input *input, const uint8_t *pages, uint64_t num, uint64_t gpa)
{
    const uint64_t how = fuzz_take(input, 1) % 3;
    const pye_status rc = how == 0 ? pye_tdx_add_pages(&whole.tdx, num, gpa)
                                   : pye_tdx_extend(&whole.tdx, pages, (size_t)num, gpa, how == 1);

    FUZZ_CHECK(rc == may(num, gpa), "accepted or refused against the header");
    for (uint64_t i = 0; rc == PYE_OK && i < num; i++) {
        if (how < 2) {
            FUZZ_CHECK(pye_tdx_add_pages(&single.tdx, 1, gpa + i * PAGE) == PYE_OK, "one page");
        }
        if (how > 0) {
            FUZZ_CHECK(pye_tdx_extend(&single.tdx, pages + i * PAGE, 1, gpa + i * PAGE, 0) ==
                           PYE_OK,
                       "one page");
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input = {data, size};
    uint8_t a[PYE_SHA384_SIZE], b[PYE_SHA384_SIZE];

    pye_snp_begin(&whole.snp, NULL);
    pye_tdx_begin(&whole.tdx);
    single = whole;
    for (int i = 0; i < 12 && input.left > 0; i++) {
        const uint64_t op = fuzz_take(&input, 1);
        uint64_t num = fuzz_take(&input, 1) % MOST;
        uint64_t gpa = fuzz_number(&input);
        if (op & 2) {
            gpa = (gpa & 0xfff) * PAGE;
        } else if (op & 4) { /* about the end of memory */
            gpa = (UINT64_C(1) << 52) - (gpa & 63) * PAGE;
        }
        if (op & 8) { /* far too many: refused before a byte is read */
            num = UINT64_MAX / PAGE - num;
        }
        /* Exactly what is asked for, so that a byte more is seen. */
        const size_t len = (size_t)(num < MOST ? num : 0) * PAGE;
        uint8_t *const pages = malloc(len ? len : PAGE);
        FUZZ_CHECK(pages != NULL, "no memory");
        memset(pages, op & 16 ? 0 : (int)i, len ? len : PAGE);
        if (op & 32 && len > 0) { /* pages that differ, beside pages that are alike */
            pages[fuzz_take(&input, 3) % len] ^= 0x40;
        }
        const pye_snp_measure snp_before = whole.snp;
        if (op & 1) {
            tdx(&input, pages, num, gpa);
        } else {
            snp(&input, pages, num, gpa);
        }
        FUZZ_CHECK(!(op & 1) || memcmp(&snp_before, &whole.snp, sizeof(snp_before)) == 0, "both");
        free(pages);
        FUZZ_CHECK(memcmp(&whole.snp, &single.snp, sizeof(whole.snp)) == 0,
                   "pages together and one by one");
        pye_tdx_digest(&whole.tdx, a);
        pye_tdx_digest(&single.tdx, b);
        FUZZ_CHECK(memcmp(a, b, sizeof(a)) == 0, "pages together and one by one");
    }
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* op, pages, address (an edge by its place), then SNP: type, how; TDX: how */
    static const uint8_t seeds[][24] = {
        {0, 3, 19, 1, 0, 16, 20, 0, 1, 0, 32, 9, 19, 17, 1, 2, 0, 1, 4, 23, 1},
        {2, 33, 5, 1, 0, 2, 4, 9, 3, 1, 2, 7, 9, 2, 2, 33, 2, 30, 3, 0, 0, 1, 3, 21},
        {4, 5, 2, 3, 1, 5, 3, 1, 1, 9, 0, 0, 0, 1, 2, 1, 2, 0, 1, 7},
        {16, 39, 0, 1, 0, 48, 39, 0, 9, 9, 1, 2, 0, 17, 12, 2, 1, 6, 1, 3, 0},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}

#elif defined(FUZZ_P256)
#include "pyenclave/ecdsa.h"

enum { KEYS = 64, WHOLE = 160, MOST = 9 };

/* RFC 6979, A.2.5: P-256, SHA-256, message "sample": key, signature, digest */
static const uint8_t sample[WHOLE] = {
    0x60, 0xfe, 0xd4, 0xba, 0x25, 0x5a, 0x9d, 0x31, 0xc9, 0x61, 0xeb, 0x74, 0xc6, 0x35, 0x6d, 0x68,
    0xc0, 0x49, 0xb8, 0x92, 0x3b, 0x61, 0xfa, 0x6c, 0xe6, 0x69, 0x62, 0x2e, 0x60, 0xf2, 0x9f, 0xb6,
    0x79, 0x03, 0xfe, 0x10, 0x08, 0xb8, 0xbc, 0x99, 0xa4, 0x1a, 0xe9, 0xe9, 0x56, 0x28, 0xbc, 0x64,
    0xf2, 0xf1, 0xb2, 0x0c, 0x2d, 0x7e, 0x9f, 0x51, 0x77, 0xa3, 0xc2, 0x94, 0xd4, 0x46, 0x22, 0x99,
    0xef, 0xd4, 0x8b, 0x2a, 0xac, 0xb6, 0xa8, 0xfd, 0x11, 0x40, 0xdd, 0x9c, 0xd4, 0x5e, 0x81, 0xd6,
    0x9d, 0x2c, 0x87, 0x7b, 0x56, 0xaa, 0xf9, 0x91, 0xc3, 0x4d, 0x0e, 0xa8, 0x4e, 0xaf, 0x37, 0x16,
    0xf7, 0xcb, 0x1c, 0x94, 0x2d, 0x65, 0x7c, 0x41, 0xd4, 0x36, 0xc7, 0xa1, 0xb6, 0xe2, 0x9f, 0x65,
    0xf3, 0xe9, 0x00, 0xdb, 0xb9, 0xaf, 0xf4, 0x06, 0x4d, 0xc4, 0xab, 0x2f, 0x84, 0x3a, 0xcd, 0xa8,
    0xaf, 0x2b, 0xdb, 0xe1, 0xaa, 0x9b, 0x6e, 0xc1, 0xe2, 0xad, 0xe1, 0xd6, 0x94, 0xf4, 0x1f, 0xc7,
    0x1a, 0x83, 0x1d, 0x02, 0x68, 0xe9, 0x89, 0x15, 0x62, 0x11, 0x3d, 0x8a, 0x62, 0xad, 0xd1, 0xbf,
};
static const uint8_t order[32] = {
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
};
static const uint8_t prime[32] = {
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
};

/* negated writes n - s, by which a good signature stays good. */
static void negated(uint8_t *s)
{
    int borrow = 0;

    for (size_t i = 32; i-- > 0;) {
        const int digit = order[i] - s[i] - borrow;
        s[i] = (uint8_t)digit;
        borrow = digit < 0;
    }
}

/* change makes another claim of the sample: numbers at an end, digits changed, halves exchanged. */
static void change(uint8_t *claim, fuzz_input *input)
{
    const uint64_t what = fuzz_take(input, 1) % 8;
    uint8_t *const part = claim + 32 * (fuzz_take(input, 1) % 5);
    const uint64_t value = fuzz_take(input, 2);

    if (what == 0) {
        memset(part, value & 1 ? 0xff : 0, 32);
    } else if (what == 1) {
        memcpy(part, value & 1 ? order : prime, 32);
        part[31] += (uint8_t)(value >> 8);
    } else if (what == 2) {
        memcpy(part, claim + 32 * (value % 5), 32);
    } else if (what == 3) {
        negated(claim + 96);
    } else if (what == 4) {
        memset(part, 0, 32);
        part[31] = (uint8_t)value;
    } else {
        part[value % 32] ^= (uint8_t)(value >> 8);
    }
}

static int is_good(const uint8_t *claim)
{
    uint8_t other[WHOLE];

    memcpy(other, claim, WHOLE);
    negated(other + 96);
    return memcmp(claim, sample, WHOLE) == 0 || memcmp(other, sample, WHOLE) == 0;
}

/* A number that is none of 1 … n - 1. */
static int is_outside(const uint8_t *number)
{
    static const uint8_t zero[32];

    return memcmp(number, zero, 32) == 0 || memcmp(number, order, 32) >= 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static pye_p256_table *generator;
    static uint8_t claims[MOST][WHOLE];
    fuzz_input input = {data, size};
    pye_p256_claim asked[MOST];
    uint8_t together[MOST + 1], alone, tabled;
    const size_t num = 1 + (size_t)fuzz_take(&input, 1) % MOST;
    size_t i;

    if (generator == NULL) {
        generator = pye_p256_table_new(NULL);
    }
    if (generator == NULL) {
        return 0; /* not this CPU: the caller looks at that */
    }
    for (i = 0; i < num; i++) {
        memcpy(claims[i], sample, WHOLE);
        for (uint64_t k = fuzz_take(&input, 1) % 4; k > 0; k--) {
            change(claims[i], &input);
        }
        pye_p256_table *const table =
            fuzz_take(&input, 1) % 4 == 0 ? pye_p256_table_new(claims[i]) : NULL;
        asked[i] = (pye_p256_claim){claims[i], table, claims[i] + KEYS, claims[i] + 128};
    }
    together[num] = 0x5a;
    FUZZ_CHECK(pye_p256_verify(together, generator, asked, num) == PYE_OK, "verify");
    FUZZ_CHECK(together[num] == 0x5a, "a verdict too many");
    for (i = 0; i < num; i++) {
        const uint8_t *const claim = claims[i];
        pye_p256_claim one = asked[i];
        FUZZ_CHECK(pye_p256_verify(&alone, generator, &one, 1) == PYE_OK && alone == together[i],
                   "another verdict in other company");
        FUZZ_CHECK(together[i] <= PYE_P256_DOUBT, "no verdict");
        FUZZ_CHECK((together[i] == PYE_P256_VALID) == is_good(claim), "valid");
        FUZZ_CHECK(together[i] == PYE_P256_INVALID ||
                       (!is_outside(claim + 64) && !is_outside(claim + 96)),
                   "r or s may not be so");
        if (one.table != NULL) { /* the other way to the same */
            one.table = NULL;
            FUZZ_CHECK(pye_p256_verify(&tabled, generator, &one, 1) == PYE_OK, "verify");
            FUZZ_CHECK(tabled == alone || tabled == PYE_P256_DOUBT || alone == PYE_P256_DOUBT,
                       "with a table and without");
            pye_p256_table_free((pye_p256_table *)(uintptr_t)asked[i].table);
        }
    }
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* claims - 1; of each: changes, then what, part, value (2) for each change; the table */
    static const uint8_t seeds[][40] = {
        {0, 0, 0},
        {3, 0, 1, 1, 3, 0, 0, 0, 0, 1, 5, 2, 3, 1, 1, 1, 5, 4, 7, 4, 0},
        {4, 1, 0, 2, 0, 0, 0, 1, 1, 2, 1, 0, 1, 1, 1, 3, 1, 255, 0, 1, 4, 3, 1, 0, 0, 0, 1},
        {8, 0, 1, 0, 1, 0, 1, 0, 0, 1, 2, 1, 0, 0, 1, 1, 4, 0, 5, 0, 0, 1, 2, 2, 3, 0, 1, 0, 1, 0, 1},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
#endif
