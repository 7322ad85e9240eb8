/* secrets_kdf.c - CRY-02 for what is not AES-GCM; built and run by test_secrets.py under valgrind.
 *
 * secrets_kdf WHAT MASK   WHAT: cmac, hmac, hkdf, sha512, equal, open or all. MASK: of CPU features, for
 * valgrind does not know every instruction. Secrets are undefined memory: a branch or an index that
 * depends on one is an error. `open` and `equal` say at the one place where the answer becomes
 * public (PYE_PUBLIC in the core) that it is. */
#include "pyenclave.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/memcheck.h>

#define LEN 333

static uint8_t secret[LEN];
static uint8_t other[LEN];
static uint8_t out[8192];

static void must(int good, const char *what)
{
    if (!good) {
        printf("%s\n", what);
        exit(2);
    }
}

static void hide(void *p, size_t len)
{
    VALGRIND_MAKE_MEM_UNDEFINED(p, len);
}

static void do_cmac(void)
{
    hide(secret, sizeof(secret));
    for (size_t len = 0; len < 70; len++) {
        pye_aes128_cmac(out, secret, secret + 16, len);
    }
}

static void do_hmac(void)
{
    hide(secret, sizeof(secret));
    for (size_t len = 0; len < 130; len++) {
        pye_hmac_sha256(out, secret, len, secret + 7, len);
    }
}

static void do_hkdf(void)
{
    static const uint8_t info[77];

    hide(secret, sizeof(secret));
    for (size_t len = 1; len < 200; len += 11) {
        must(pye_hkdf_sha256(out, len, secret, 32, secret + 32, 32, info, sizeof(info)) == PYE_OK,
             "hkdf");
    }
    must(pye_hkdf_sha256(out, PYE_HKDF_SHA256_MAX, secret, 32, NULL, 0, info, 1) == PYE_OK, "hkdf");
}

static void do_sha512(void)
{
    hide(secret, sizeof(secret));
    for (size_t len = 0; len < 300; len++) {
        pye_sha384(out, secret, len);
        pye_sha512(out, secret, len);
    }
}

static void do_equal(void)
{
    memcpy(other, secret, sizeof(other));
    hide(secret, sizeof(secret));
    hide(other, sizeof(other));
    for (size_t len = 0; len < 40; len++) {
        must(pye_ct_equal(secret, other, len) == 1, "equal");
    }
    for (size_t at = 0; at < 40; at++) {
        other[at] ^= 1;
        must(pye_ct_equal(secret, other, 40) == 0, "not equal");
        other[at] ^= 1;
    }
}

/* The tag that belongs to a forged message is a secret: whoever learns it byte by byte has forged
 * one. Nothing but "equal" or "not" may come out of opening. */
static void do_open(void)
{
    static const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE];
    static const uint8_t iv[PYE_GCM_IV_SIZE];
    static const pye_page_info info = {4096, 3, 2};
    static uint8_t page[PYE_PAGE_SIZE];
    static uint8_t sealed[3 * PYE_PAGE_SIZE];
    uint8_t tags[3][PYE_PAGE_TAG_SIZE];
    uint64_t version = 0;
    pye_gcm_key *gcm = aligned_alloc(PYE_GCM_KEY_ALIGN, pye_gcm_key_size());
    pye_page_key *pages = aligned_alloc(PYE_PAGE_KEY_ALIGN, pye_page_key_size());

    hide(secret, 32);
    must(pye_gcm_init(gcm, secret, 32, PYE_GCM_ANY) == PYE_OK, "init");
    must(pye_page_key_init(pages, secret, 32, enclave, PYE_GCM_ANY) == PYE_OK, "page key");
    must(pye_gcm_seal(gcm, sealed, tags[0], iv, page, LEN, NULL, 0) == PYE_OK, "seal");
    must(pye_gcm_open(gcm, out, iv, sealed, LEN, tags[0], NULL, 0) == PYE_OK, "open");
    tags[0][9] ^= 1;
    must(pye_gcm_open(gcm, out, iv, sealed, LEN, tags[0], NULL, 0) == PYE_E_AUTH, "forged");
    must(pye_page_seal(pages, sealed, tags[0], &version, page, &info) == PYE_OK, "seal page");
    must(pye_page_open(pages, out, sealed, tags[0], version, &info) == PYE_OK, "open page");
    tags[0][0] ^= 1;
    must(pye_page_open(pages, out, sealed, tags[0], version, &info) == PYE_E_AUTH, "forged page");
    must(pye_pages_seal(pages, sealed, tags[0], &version, sealed, 3, &info) == PYE_OK, "batch");
    tags[2][15] ^= 1;
    must(pye_pages_open(pages, sealed, sealed, tags[0], NULL, version, 3, &info) == PYE_E_AUTH,
         "forged batch");
    free(gcm);
    free(pages);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } all[] = {
        {"cmac", do_cmac}, {"hmac", do_hmac},   {"hkdf", do_hkdf},
        {"sha512", do_sha512}, {"equal", do_equal}, {"open", do_open},
    };

    int found = 0;

    if (argc != 3) {
        return 2;
    }
    for (size_t i = 0; i < sizeof(secret); i++) {
        secret[i] = (uint8_t)(i * 7 + 3);
    }
    pye_cpu_set_mask((uint32_t)strtoul(argv[2], NULL, 0));
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        if (strcmp(argv[1], "all") == 0 || strcmp(argv[1], all[i].name) == 0) {
            all[i].run();
            found = 1;
        }
    }
    return found ? 0 : 2;
}
