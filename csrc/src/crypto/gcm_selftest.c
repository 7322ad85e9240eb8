/* gcm_selftest.c - known answers for each implementation, from an independent library. */
#include "base/check.h"
#include "crypto/gcm_impl.h"

/* Long enough for the wide loops, their last parts and odd bytes. */
#define LEN 733
#define AAD_LEN 37

/* Tags over data[i] = 7 i + 3 and aad[i] = 5 i + 1 with iv[i] = i + 1, key[i] = 11 i + 9, all modulo
 * 256. A tag covers the ciphertext, so a wrong byte anywhere gives another tag. */
typedef struct {
    size_t secret_len;
    uint8_t tag[PYE_GCM_TAG_SIZE];
    uint8_t page_tag[PYE_GCM_TAG_SIZE];
} answer;

/* The page: GCM_PAGE_SIZE bytes of data, a header of GCM_HEADER_SIZE bytes of aad, version
 * 0x0102030405060708 and thus the IV 01 02 03 04 05 06 07 08 00 00 00 00. */
static const answer answers[] = {
    {16,
     {0x2d, 0x21, 0x48, 0x26, 0xac, 0x5f, 0xfc, 0x37,
      0xbb, 0x29, 0xd2, 0xd0, 0xab, 0x22, 0x24, 0xe6},
     {0xb1, 0xcc, 0x1f, 0x54, 0xb2, 0x1b, 0x12, 0xd4,
      0xea, 0xdd, 0xa6, 0x4e, 0x23, 0xe7, 0x54, 0x95}},
    {32,
     {0x88, 0x04, 0x28, 0x7c, 0x07, 0x1a, 0x47, 0x13,
      0x7b, 0xea, 0x96, 0xe2, 0x45, 0x6d, 0x18, 0x3a},
     {0x92, 0x5b, 0xc5, 0xfc, 0x24, 0x5e, 0x72, 0xe8,
      0x63, 0x01, 0x08, 0x81, 0x8e, 0x82, 0xf0, 0x31}},
};

static void fill(uint8_t *out, size_t len, unsigned factor, unsigned offset)
{
    for (size_t i = 0; i < len; i++) {
        out[i] = (uint8_t)(factor * i + offset);
    }
}

static pye_status test_one(const answer *expected, uint32_t implementation)
{
    pye_status rc;
    pye_gcm_key key;
    gcm_page page;
    uint8_t secret[32];
    uint8_t iv[PYE_GCM_IV_SIZE];
    uint8_t aad[AAD_LEN];
    uint8_t data[GCM_PAGE_SIZE];
    uint8_t out[GCM_PAGE_SIZE];
    uint8_t tag[PYE_GCM_TAG_SIZE];

    fill(secret, sizeof(secret), 11, 9);
    fill(iv, sizeof(iv), 1, 1);
    fill(aad, sizeof(aad), 5, 1);
    fill(data, sizeof(data), 7, 3);
    PYE_CHECK(pye_gcm_init(&key, secret, expected->secret_len, implementation));
    PYE_CHECK(pye_gcm_seal(&key, out, tag, iv, data, LEN, aad, AAD_LEN));
    PYE_REQUIRE(memcmp(tag, expected->tag, sizeof(tag)) == 0, PYE_E_SELF_TEST);
    PYE_CHECK(pye_gcm_open(&key, out, iv, out, LEN, tag, aad, AAD_LEN));
    PYE_REQUIRE(memcmp(out, data, LEN) == 0, PYE_E_SELF_TEST);
    tag[15] ^= 1;
    PYE_REQUIRE(pye_gcm_open(&key, out, iv, out, LEN, tag, aad, AAD_LEN) == PYE_E_AUTH,
                PYE_E_SELF_TEST);

    fill(page.header, sizeof(page.header), 5, 1);
    page.in = data;
    page.out = out;
    page.tag = tag;
    page.version = UINT64_C(0x0102030405060708);
    key.implementation->seal_pages(&key, &page, 1, 0);
    PYE_REQUIRE(memcmp(tag, expected->page_tag, sizeof(tag)) == 0, PYE_E_SELF_TEST);
    memset(tag, 0, sizeof(tag));
    page.in = out;
    key.implementation->open_pages(&key, &page, 1, 0);
    PYE_REQUIRE(memcmp(tag, expected->page_tag, sizeof(tag)) == 0, PYE_E_SELF_TEST);
    PYE_REQUIRE(memcmp(out, data, sizeof(data)) == 0, PYE_E_SELF_TEST);
done:
    /* nothing here is secret; not wiped */
    return rc;
}

pye_status pye_gcm_self_test(uint32_t implementation)
{
    PYE_REFUSE_IF(implementation == 0 || (implementation & (implementation - 1)) != 0,
                  PYE_E_ARGUMENT);
    for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
        const pye_status rc = test_one(&answers[i], implementation);

        PYE_REFUSE_IF(rc != PYE_OK, rc == PYE_E_UNSUPPORTED ? rc : PYE_E_SELF_TEST);
    }
    return PYE_OK;
}
