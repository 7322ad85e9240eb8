/* core_answers.c - the core's answers to questions on standard input, one a line; built for AArch64
 * and asked by test_aarch64.py, which knows the right ones from elsewhere.
 *
 * features MASK
 * hash MASK DATA                    SHA-256, SHA-384 and SHA-512
 * hmac MASK KEY DATA
 * cmac MASK KEY DATA
 * gcm MASK KEY IV AAD DATA          ciphertext and tag
 * page MASK KEY ENCLAVE ADDRESS FLAGS TYPE DATA   of each page ciphertext and tag
 * ring MASK COUNT                   that many calls between two threads; how many came back right
 * selftest MASK
 *
 * MASK is pye_cpu_set_mask's; bytes are hexadecimal, `-` for none. Whatever is sealed is opened
 * again: in place, at another alignment, and with each part changed, which must be refused. */
#define _GNU_SOURCE
#include "crypto/sha256.h"
#include "pyenclave.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LINE (1 << 20)
#define MAX_DATA (1 << 17)
#define MAX_WORDS 10
#define SLOT 16384
#define MUST(what, condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("wrong: %s\n", what);                                                           \
            return;                                                                                \
        }                                                                                          \
    } while (0)

typedef struct {
    uint8_t *at;
    size_t len;
} bytes;

static _Alignas(64) uint8_t key_memory[1 << 16];
static uint8_t sealed[MAX_DATA + 128];
static uint8_t other[MAX_DATA + 128];
static unsigned long lines;

static void print(const uint8_t *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        printf("%02x", data[i]);
    }
    putchar(' ');
}

/* unhex turns a word into bytes, in its place. */
static bytes unhex(char *word)
{
    bytes out = {(uint8_t *)word, 0};

    if (strcmp(word, "-") == 0) {
        return out;
    }
    for (; word[0] != 0 && word[1] != 0; word += 2) {
        const char pair[3] = {word[0], word[1], 0};

        out.at[out.len++] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return out;
}

static void do_hash(bytes data)
{
    uint8_t digest[64];
    uint32_t whole[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint32_t apart[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    const size_t num_blocks = data.len / 64;
    const uint8_t **blocks = calloc(num_blocks + 1, sizeof(*blocks));

    for (size_t i = 0; i < num_blocks; i++) {
        blocks[i] = data.at + 64 * i;
    }
    pye_sha256_blocks(pye_sha256_select(), whole, data.at, num_blocks);
    pye_sha256_gather(pye_sha256_select(), apart, blocks, num_blocks);
    free(blocks);
    MUST("blocks that lie apart", memcmp(whole, apart, sizeof(whole)) == 0);
    pye_sha256(digest, data.at, data.len);
    print(digest, PYE_SHA256_SIZE);
    pye_sha384(digest, data.at, data.len);
    print(digest, PYE_SHA384_SIZE);
    pye_sha512(digest, data.at, data.len);
    print(digest, PYE_SHA512_SIZE);
    printf("%s\n", pye_sha256_variant());
}

static int is_zero(const uint8_t *data, size_t len)
{
    uint8_t any = 0;

    for (size_t i = 0; i < len; i++) {
        any |= data[i];
    }
    return any == 0;
}

static void do_gcm(bytes secret, bytes iv, bytes aad, bytes data)
{
    pye_gcm_key *key = (pye_gcm_key *)(void *)key_memory;
    uint8_t *out = sealed + lines % 67; /* every alignment in turn */
    uint8_t *back = other + lines % 61;
    uint8_t tag[PYE_GCM_TAG_SIZE];
    uint8_t tag_again[PYE_GCM_TAG_SIZE];
    const size_t len = data.len;

    MUST("init", pye_gcm_init(key, secret.at, secret.len, PYE_GCM_ANY) == PYE_OK);
    MUST("seal", pye_gcm_seal(key, out, tag, iv.at, data.at, len, aad.at, aad.len) == PYE_OK);
    memcpy(back, data.at, len);
    MUST("seal in place",
         pye_gcm_seal(key, back, tag_again, iv.at, back, len, aad.at, aad.len) == PYE_OK);
    MUST("the same in place", memcmp(out, back, len) == 0 && memcmp(tag, tag_again, 16) == 0);
    MUST("open", pye_gcm_open(key, back, iv.at, back, len, tag, aad.at, aad.len) == PYE_OK);
    MUST("opened", memcmp(back, data.at, len) == 0);
    for (size_t i = 0; i < 16; i += 5) {
        tag[i] ^= 0x10;
        memset(back, 0xaa, len);
        MUST("a changed tag",
             pye_gcm_open(key, back, iv.at, out, len, tag, aad.at, aad.len) == PYE_E_AUTH);
        MUST("zeroed", is_zero(back, len));
        tag[i] ^= 0x10;
    }
    if (len != 0) {
        out[lines % len] ^= 1;
        MUST("a changed byte",
             pye_gcm_open(key, back, iv.at, out, len, tag, aad.at, aad.len) == PYE_E_AUTH);
        MUST("zeroed", is_zero(back, len));
        out[lines % len] ^= 1;
    }
    if (aad.len != 0) {
        aad.at[lines % aad.len] ^= 0x80;
        MUST("a changed header",
             pye_gcm_open(key, back, iv.at, out, len, tag, aad.at, aad.len) == PYE_E_AUTH);
    }
    print(out, len);
    print(tag, sizeof(tag));
    puts(pye_gcm_implementation(key));
    pye_gcm_wipe(key);
    MUST("a wiped key", is_zero(key_memory, pye_gcm_key_size()));
}

static void do_page(bytes secret, bytes enclave, const pye_page_info *first, bytes data)
{
    pye_page_key *key = (pye_page_key *)(void *)key_memory;
    uint8_t *tags = other + MAX_DATA / 2;
    uint8_t *out = sealed + lines % 67;
    const size_t num_pages = data.len / PYE_PAGE_SIZE;
    uint64_t version = 0;

    MUST("key", pye_page_key_init(key, secret.at, secret.len, enclave.at, PYE_GCM_ANY) == PYE_OK);
    MUST("seal",
         pye_pages_seal(key, out, tags, &version, data.at, num_pages, first) == PYE_OK);
    MUST("version", version == 1);
    for (size_t i = 0; i < num_pages; i++) {
        print(out + i * PYE_PAGE_SIZE, PYE_PAGE_SIZE);
        print(tags + i * PYE_PAGE_TAG_SIZE, PYE_PAGE_TAG_SIZE);
    }
    MUST("open", pye_pages_open(key, other, out, tags, NULL, 1, num_pages, first) == PYE_OK);
    MUST("opened", memcmp(other, data.at, data.len) == 0);
    MUST("an older version",
         pye_page_open(key, other, out, tags, 2, first) == PYE_E_AUTH);
    MUST("zeroed", is_zero(other, PYE_PAGE_SIZE));
    puts(pye_page_key_implementation(key));
    pye_page_key_destroy(key);
}

/* ---- the ring, with two threads of this process as its sides ---- */

static _Alignas(4096) uint8_t ring[1 << 19];
static unsigned long calls;
static const pye_wait_ops ops = {pye_wait_futex, pye_wake_futex, pye_wait_yield, sched_getcpu};

/* Some messages take several fragments. */
static size_t length_of(unsigned long call)
{
    return call % 64 == 0 ? 9 * SLOT + call % 100 : call % 600;
}

static void content(uint8_t *out, size_t len, unsigned long call)
{
    for (size_t i = 0; i < len; i++) {
        out[i] = (uint8_t)(call * 31 + i * 7);
    }
}

static pye_status take(pye_lane *lane, uint8_t *out, size_t *len)
{
    pye_lane_header header;
    pye_status rc;

    do {
        rc = pye_lane_wait(lane, &header, 100);
    } while (rc == PYE_E_TIMEOUT);
    *len = (size_t)header.total;
    while (rc == PYE_OK && (rc = pye_lane_read(lane, out, *len, 100)) == PYE_E_TIMEOUT) {
        rc = PYE_OK;
    }
    return rc;
}

static pye_status give(pye_lane *lane, uint16_t kind, const uint8_t *data, size_t len)
{
    const pye_segment segment = {data, len};
    pye_status rc;

    do {
        rc = pye_lane_write(lane, kind, 1, &segment, 1, 100);
    } while (rc == PYE_E_TIMEOUT);
    return rc;
}

static void *serve(void *lane)
{
    static uint8_t buffer[10 * SLOT];
    size_t len;

    for (unsigned long i = 0; i < calls; i++) {
        if (take(lane, buffer, &len) != PYE_OK) {
            break;
        }
        for (size_t j = 0; j < len; j++) {
            buffer[j] ^= 0xff;
        }
        if (give(lane, PYE_FRAME_RESULT, buffer, len) != PYE_OK) {
            break;
        }
    }
    return NULL;
}

static pye_lane *end_of_ring(uint32_t side)
{
    pye_lane *lane = NULL;
    const pye_status rc =
        pye_lane_new(&lane, ring, pye_ring_size(1, SLOT), 1, SLOT, 0, side, sizeof(ring), &ops);

    return rc == PYE_OK ? lane : NULL;
}

static void do_ring(unsigned long count)
{
    static uint8_t question[10 * SLOT];
    static uint8_t answer[10 * SLOT];
    pye_lane *host = end_of_ring(PYE_SIDE_HOST);
    pye_lane *worker = end_of_ring(PYE_SIDE_WORKER);
    pthread_t thread;
    unsigned long right = 0;
    size_t len = 0;

    calls = count;
    MUST("ends", host != NULL && worker != NULL);
    MUST("thread", pthread_create(&thread, NULL, serve, worker) == 0);
    for (unsigned long i = 0; i < count; i++) {
        content(question, length_of(i), i);
        MUST("call", give(host, PYE_FRAME_CALL, question, length_of(i)) == PYE_OK);
        MUST("answer", take(host, answer, &len) == PYE_OK);
        MUST("length", len == length_of(i));
        for (size_t j = 0; j < len; j++) {
            answer[j] ^= 0xff;
        }
        right += memcmp(question, answer, len) == 0;
    }
    pthread_join(thread, NULL);
    pye_lane_free(host);
    pye_lane_free(worker);
    printf("%lu\n", right);
}

static void do_features(void)
{
    for (int bit = 0; bit < 32; bit++) {
        if (pye_cpu_features() >> bit & 1) {
            printf("%s ", pye_cpu_feature_name((uint32_t)1 << bit));
        }
    }
    puts(pye_sha256_variant());
}

static void do_self_test(void)
{
    const uint32_t set = pye_gcm_implementations();

    for (uint32_t bit = 1; bit != 0; bit <<= 1) {
        MUST("gcm", (set & bit) == 0 || pye_gcm_self_test(bit) == PYE_OK);
    }
    MUST("hash", pye_hash_self_test() == PYE_OK);
    puts("ok");
}

static void answer_line(const char *what, char **words, int num)
{
    uint8_t out[PYE_SHA256_SIZE];

    if (strcmp(what, "features") == 0) {
        do_features();
    } else if (strcmp(what, "selftest") == 0) {
        do_self_test();
    } else if (strcmp(what, "ring") == 0 && num == 1) {
        do_ring(strtoul(words[0], NULL, 10));
    } else if (strcmp(what, "hash") == 0 && num == 1) {
        do_hash(unhex(words[0]));
    } else if (strcmp(what, "hmac") == 0 && num == 2) {
        const bytes key = unhex(words[0]);
        const bytes data = unhex(words[1]);

        pye_hmac_sha256(out, key.at, key.len, data.at, data.len);
        print(out, PYE_SHA256_SIZE);
        putchar('\n');
    } else if (strcmp(what, "cmac") == 0 && num == 2) {
        const bytes key = unhex(words[0]);
        const bytes data = unhex(words[1]);

        pye_aes128_cmac(out, key.at, data.at, data.len);
        print(out, PYE_CMAC_SIZE);
        putchar('\n');
    } else if (strcmp(what, "gcm") == 0 && num == 4) {
        do_gcm(unhex(words[0]), unhex(words[1]), unhex(words[2]), unhex(words[3]));
    } else if (strcmp(what, "page") == 0 && num == 6) {
        const pye_page_info first = {strtoull(words[2], NULL, 10),
                                     (uint32_t)strtoul(words[3], NULL, 10),
                                     (uint8_t)strtoul(words[4], NULL, 10)};

        do_page(unhex(words[0]), unhex(words[1]), &first, unhex(words[5]));
    } else {
        puts("wrong: question");
    }
}

int main(void)
{
    static char line[MAX_LINE];
    char *words[MAX_WORDS] = {NULL};

    if (pye_gcm_key_size() > sizeof(key_memory) || pye_page_key_size() > sizeof(key_memory) ||
        pye_ring_size(1, SLOT) > sizeof(ring)) {
        return 2;
    }
    for (; fgets(line, sizeof(line), stdin) != NULL; lines++) {
        int num = 0;

        for (char *word = strtok(line, " \n"); word != NULL && num < MAX_WORDS;
             word = strtok(NULL, " \n")) {
            words[num++] = word;
        }
        if (num < 2) {
            return 3;
        }
        pye_cpu_set_mask((uint32_t)strtoul(words[1], NULL, 16));
        answer_line(words[0], words + 2, num - 2);
        fflush(stdout);
    }
    return 0;
}
