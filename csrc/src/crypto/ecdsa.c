/* ecdsa.c - verification of ECDSA P-256: chooses the implementation, and tests it. */
#include "base/check.h"
#include "crypto/p256_ifma.h"

#include <stdlib.h>
#include <string.h>

#define AT_A_TIME 4

static const uint8_t generator_key[PYE_P256_KEY_SIZE] = {
    0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2,
    0x77, 0x03, 0x7d, 0x81, 0x2d, 0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96,
    0x4f, 0xe3, 0x42, 0xe2, 0xfe, 0x1a, 0x7f, 0x9b, 0x8e, 0xe7, 0xeb, 0x4a, 0x7c, 0x0f, 0x9e, 0x16,
    0x2b, 0xce, 0x33, 0x57, 0x6b, 0x31, 0x5e, 0xce, 0xcb, 0xb6, 0x40, 0x68, 0x37, 0xbf, 0x51, 0xf5,
};
/* RFC 6979, A.2.5: P-256, SHA-256, message "sample" */
static const uint8_t test_key[PYE_P256_KEY_SIZE] = {
    0x60, 0xfe, 0xd4, 0xba, 0x25, 0x5a, 0x9d, 0x31, 0xc9, 0x61, 0xeb, 0x74, 0xc6, 0x35, 0x6d, 0x68,
    0xc0, 0x49, 0xb8, 0x92, 0x3b, 0x61, 0xfa, 0x6c, 0xe6, 0x69, 0x62, 0x2e, 0x60, 0xf2, 0x9f, 0xb6,
    0x79, 0x03, 0xfe, 0x10, 0x08, 0xb8, 0xbc, 0x99, 0xa4, 0x1a, 0xe9, 0xe9, 0x56, 0x28, 0xbc, 0x64,
    0xf2, 0xf1, 0xb2, 0x0c, 0x2d, 0x7e, 0x9f, 0x51, 0x77, 0xa3, 0xc2, 0x94, 0xd4, 0x46, 0x22, 0x99,
};
static const uint8_t test_digest[PYE_P256_DIGEST_SIZE] = {
    0xaf, 0x2b, 0xdb, 0xe1, 0xaa, 0x9b, 0x6e, 0xc1, 0xe2, 0xad, 0xe1, 0xd6, 0x94, 0xf4, 0x1f, 0xc7,
    0x1a, 0x83, 0x1d, 0x02, 0x68, 0xe9, 0x89, 0x15, 0x62, 0x11, 0x3d, 0x8a, 0x62, 0xad, 0xd1, 0xbf,
};
static const uint8_t test_signature[PYE_P256_SIGNATURE_SIZE] = {
    0xef, 0xd4, 0x8b, 0x2a, 0xac, 0xb6, 0xa8, 0xfd, 0x11, 0x40, 0xdd, 0x9c, 0xd4, 0x5e, 0x81, 0xd6,
    0x9d, 0x2c, 0x87, 0x7b, 0x56, 0xaa, 0xf9, 0x91, 0xc3, 0x4d, 0x0e, 0xa8, 0x4e, 0xaf, 0x37, 0x16,
    0xf7, 0xcb, 0x1c, 0x94, 0x2d, 0x65, 0x7c, 0x41, 0xd4, 0x36, 0xc7, 0xa1, 0xb6, 0xe2, 0x9f, 0x65,
    0xf3, 0xe9, 0x00, 0xdb, 0xb9, 0xaf, 0xf4, 0x06, 0x4d, 0xc4, 0xab, 0x2f, 0x84, 0x3a, 0xcd, 0xa8,
};

static int supported(void)
{
    const uint32_t needed = PYE_CPU_AVX512 | PYE_CPU_IFMA | PYE_CPU_BMI2;

    return (pye_cpu_features() & needed) == needed;
}

pye_p256_table *pye_p256_table_new(const uint8_t *key)
{
    pye_p256_table *table = NULL;

#if defined(__x86_64__)
    if (supported()) {
        table = malloc(sizeof(*table));
    }
    if (table && !pye_p256_points_make(&table->points, key ? key : generator_key)) {
        free(table);
        table = NULL;
    }
#else
    (void)key;
    (void)generator_key;
#endif
    return table;
}

void pye_p256_table_free(pye_p256_table *table)
{
    free(table); /* public */
}

pye_status pye_p256_verify(uint8_t *verdicts, const pye_p256_table *generator,
                           const pye_p256_claim *claims, size_t count)
{
    memset(verdicts, PYE_P256_DOUBT, count);
    PYE_REFUSE_IF(!supported(), PYE_E_UNSUPPORTED);
#if defined(__x86_64__)
    pye_p256_claim group[AT_A_TIME];
    size_t place[AT_A_TIME], held = 0;
    uint8_t found[AT_A_TIME];

    /* Keys without a table first: they share most of their work. */
    for (size_t turn = 0; turn < 2 * count; turn++) {
        const size_t i = turn % count;
        if ((claims[i].table == NULL) == (turn < count)) {
            group[held] = claims[i];
            place[held++] = i;
        }
        if (held == AT_A_TIME || (held && turn + 1 == 2 * count)) {
            pye_p256_verify_four(found, &generator->points, group, held);
            while (held) {
                held--;
                verdicts[place[held]] = found[held];
            }
        }
    }
#else
    (void)generator;
    (void)claims;
#endif
    return PYE_OK;
}

pye_status pye_p256_self_test(const pye_p256_table *generator)
{
    pye_p256_table *table = pye_p256_table_new(test_key);
    pye_status rc = PYE_E_SELF_TEST;
    uint8_t verdicts[4 * AT_A_TIME];
    uint8_t wrong[4 * AT_A_TIME][PYE_P256_SIGNATURE_SIZE];
    pye_p256_claim claims[4 * AT_A_TIME];

    PYE_REFUSE_IF(!table, PYE_E_UNSUPPORTED);
    /* Every second one is good; the others have one bit changed, each another one. */
    for (size_t i = 0; i < 4 * AT_A_TIME; i++) {
        memcpy(wrong[i], test_signature, sizeof(wrong[i]));
        wrong[i][(i * 4) % sizeof(wrong[i])] ^= (uint8_t)(i % 2 ? 1u << (i / 2) : 0);
        claims[i].key = test_key;
        claims[i].table = i % 4 < 2 ? NULL : table;
        claims[i].signature = wrong[i];
        claims[i].digest = test_digest;
    }
    if (pye_p256_verify(verdicts, generator, claims, 4 * AT_A_TIME) == PYE_OK) {
        rc = PYE_OK;
        for (size_t i = 0; i < 4 * AT_A_TIME; i++) {
            if (verdicts[i] != (i % 2 ? PYE_P256_INVALID : PYE_P256_VALID)) {
                rc = PYE_E_SELF_TEST;
            }
        }
    }
    pye_p256_table_free(table);
    return rc;
}
