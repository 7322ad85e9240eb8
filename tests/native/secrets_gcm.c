/* secrets_gcm.c - two looks at where AES-GCM's secrets go; built and run by test_secrets.py.
 *
 * secrets_gcm ct N    under valgrind: keys are marked undefined, so that a branch or an index that
 *                     depends on one is an error (CRY-02). N is a PYE_GCM_ implementation.
 * secrets_gcm wipe N  after each call, the vector registers and the stack below hold no word of the
 *                     key's tables, of the key stream or of the plaintext (CRY-06). */
#include "pyenclave/gcm.h"
#include "pyenclave/page.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/memcheck.h>

#define LEN 1500
#define DEPTH 24576

static uint8_t secret[32];
static uint8_t data[PYE_PAGE_SIZE];
static uint8_t out[PYE_PAGE_SIZE];
static uint8_t again[PYE_PAGE_SIZE];
static uint8_t aad[77];
static uint8_t iv[PYE_GCM_IV_SIZE];
static uint8_t tag[PYE_GCM_TAG_SIZE];
static pye_gcm_key *gcm;
static pye_page_key *pages;
static uint64_t version;
static const pye_page_info info = {4096, 3, 2};

static void must(pye_status rc, const char *what)
{
    if (rc != PYE_OK) {
        printf("%s: %s\n", what, pye_status_name(rc));
        exit(2);
    }
}

static void fill(uint8_t *p, size_t len)
{
    static uint64_t x = 88172645463325252u;

    for (size_t i = 0; i < len; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        p[i] = (uint8_t)(x >> 56);
    }
}

static size_t secret_len;
static uint32_t implementation;

static void do_init(void)
{
    must(pye_gcm_init(gcm, secret, secret_len, implementation), "init");
}

static void do_seal(void)
{
    must(pye_gcm_seal(gcm, out, tag, iv, data, LEN, aad, sizeof(aad)), "seal");
}

static void do_open(void)
{
    must(pye_gcm_open(gcm, again, iv, out, LEN, tag, aad, sizeof(aad)), "open");
}

static void do_seal_page(void)
{
    must(pye_page_seal(pages, out, tag, &version, data, &info), "seal page");
}

static void do_open_page(void)
{
    must(pye_page_open(pages, again, out, tag, version, &info), "open page");
}

/* ---- ct ---- */

static void constant_time(void)
{
    static uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE];

    VALGRIND_MAKE_MEM_UNDEFINED(secret, sizeof(secret));
    do_init();
    must(pye_page_key_init(pages, secret, secret_len, enclave, implementation), "page key");
    VALGRIND_MAKE_MEM_UNDEFINED(data, sizeof(data));
    do_seal();
    /* Ciphertext and tag are public, and whether they match is the answer. */
    VALGRIND_MAKE_MEM_DEFINED(out, sizeof(out));
    VALGRIND_MAKE_MEM_DEFINED(tag, sizeof(tag));
    /* The comparison itself is by design a branch on its result: only the computing is checked. */
    (void)pye_gcm_implementation(gcm);
    do_seal_page();
}

/* ---- wipe ---- */

static uint64_t registers[32 * 8];
static uint64_t found_stack[DEPTH / 8];

#define NOINLINE __attribute__((noinline))

static NOINLINE void dirty_stack(void)
{
    volatile uint8_t area[DEPTH];

    for (size_t i = 0; i < sizeof(area); i++) {
        area[i] = 0xee;
    }
}

static NOINLINE void save_stack(void)
{
    volatile uint64_t here = 0;
    const uint64_t *top = (const uint64_t *)(uintptr_t)&here;

    /* what lies below our own frame is what the calls before have left */
    for (size_t i = 0; i < DEPTH / 8 - 64; i++) {
        uint64_t word;
#if defined(__aarch64__)
        __asm__ volatile("ldr %0, [%1]" : "=r"(word) : "r"(top - DEPTH / 8 + i));
#else
        __asm__ volatile("movq (%1), %0" : "=r"(word) : "r"(top - DEPTH / 8 + i));
#endif
        found_stack[i] = word;
    }
}

static NOINLINE void save_registers(void)
{
    memset(registers, 0, sizeof(registers));
#if defined(__AVX512F__)
#define SAVE(n) __asm__ volatile("vmovdqu64 %%zmm" #n ", %0" : "=m"(*(uint64_t(*)[8])(registers + 8 * n)))
    SAVE(0); SAVE(1); SAVE(2); SAVE(3); SAVE(4); SAVE(5); SAVE(6); SAVE(7);
    SAVE(8); SAVE(9); SAVE(10); SAVE(11); SAVE(12); SAVE(13); SAVE(14); SAVE(15);
    SAVE(16); SAVE(17); SAVE(18); SAVE(19); SAVE(20); SAVE(21); SAVE(22); SAVE(23);
    SAVE(24); SAVE(25); SAVE(26); SAVE(27); SAVE(28); SAVE(29); SAVE(30); SAVE(31);
#elif defined(__aarch64__)
#define SAVE(n) __asm__ volatile("str q" #n ", %0" : "=m"(*(uint64_t(*)[2])(registers + 8 * n)))
    SAVE(0); SAVE(1); SAVE(2); SAVE(3); SAVE(4); SAVE(5); SAVE(6); SAVE(7);
    SAVE(8); SAVE(9); SAVE(10); SAVE(11); SAVE(12); SAVE(13); SAVE(14); SAVE(15);
    SAVE(16); SAVE(17); SAVE(18); SAVE(19); SAVE(20); SAVE(21); SAVE(22); SAVE(23);
    SAVE(24); SAVE(25); SAVE(26); SAVE(27); SAVE(28); SAVE(29); SAVE(30); SAVE(31);
#else
#define SAVE(n) __asm__ volatile("movdqu %%xmm" #n ", %0" : "=m"(*(uint64_t(*)[2])(registers + 8 * n)))
    SAVE(0); SAVE(1); SAVE(2); SAVE(3); SAVE(4); SAVE(5); SAVE(6); SAVE(7);
    SAVE(8); SAVE(9); SAVE(10); SAVE(11); SAVE(12); SAVE(13); SAVE(14); SAVE(15);
#endif
}

static int compare_words(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a;
    const uint64_t y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static uint64_t *words;
static size_t num_words;

static void add_words(const void *p, size_t len)
{
    for (size_t i = 0; i + 8 <= len; i += 8) {
        uint64_t word;

        memcpy(&word, (const uint8_t *)p + i, 8);
        /* small numbers and pointers are not secret */
        if (word >> 48 != 0 && word >> 48 != 0xffff) {
            words[num_words++] = word;
        }
    }
}

static int check(const char *what, const uint64_t *p, size_t len)
{
    int bad = 0;

    for (size_t i = 0; i < len; i++) {
        if (bsearch(&p[i], words, num_words, 8, compare_words) != NULL) {
            printf("%s holds a secret word at %zu\n", what, i);
            bad++;
        }
    }
    return bad;
}

static int watch(const char *name, void (*call)(void), size_t len)
{
    uint8_t stream[PYE_PAGE_SIZE];
    int bad;

    dirty_stack();
    call();
    save_registers();
    save_stack();
    num_words = 0;
    add_words(secret, secret_len);
    add_words(gcm, pye_gcm_key_size());
    if (pages != NULL && len == PYE_PAGE_SIZE) {
        add_words((const uint8_t *)pages + pye_page_key_size() - pye_gcm_key_size(),
                  pye_gcm_key_size());
    }
    if (len != 0) {
        for (size_t i = 0; i < len; i++) {
            stream[i] = data[i] ^ out[i];
        }
        add_words(stream, len);
        add_words(data, len);
    }
    memset(stream, 0, sizeof(stream));
    qsort(words, num_words, 8, compare_words);
    bad = check("a register", registers, sizeof(registers) / 8);
    bad += check("the stack", found_stack, sizeof(found_stack) / 8);
    if (bad != 0) {
        printf("after %s: %d words\n", name, bad);
    }
    return bad;
}

static int wiping(void)
{
    static const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE];
    int bad = 0;

    words = malloc(2 * pye_page_key_size() + 4 * PYE_PAGE_SIZE);
    bad += watch("init", do_init, 0);
    must(pye_page_key_init(pages, secret, secret_len, enclave, implementation), "page key");
    bad += watch("seal", do_seal, LEN);
    bad += watch("open", do_open, LEN);
    bad += watch("seal page", do_seal_page, PYE_PAGE_SIZE);
    bad += watch("open page", do_open_page, PYE_PAGE_SIZE);
    return bad;
}

int main(int argc, char **argv)
{
    int bad = 0;

    if (argc != 3) {
        return 2;
    }
    implementation = (uint32_t)atoi(argv[2]);
    gcm = aligned_alloc(PYE_GCM_KEY_ALIGN, pye_gcm_key_size());
    pages = aligned_alloc(PYE_PAGE_KEY_ALIGN, pye_page_key_size());
    fill(data, sizeof(data));
    fill(aad, sizeof(aad));
    fill(iv, sizeof(iv));
    for (secret_len = 16; secret_len <= 32; secret_len += 16) {
        memset(gcm, 0, pye_gcm_key_size());
        memset(pages, 0, pye_page_key_size());
        fill(secret, sizeof(secret));
        if (strcmp(argv[1], "ct") == 0) {
            constant_time();
        } else {
            bad += wiping();
        }
    }
    return bad != 0;
}
