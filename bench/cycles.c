/* cycles.c - core cycles of the hot loops, each implementation beside the other; see cycles.py.
 *
 * Cycles are counted by perf_event_open. Where there is no counter (most virtual machines), the
 * time is measured and, right before it, that of a chain of dependent multiplications, which takes
 * three cycles each on every core that matters here: their quotient. Of both the best of many
 * short rounds counts, so neighbours and interrupts fall out. */
#define _GNU_SOURCE
#include "crypto/sha256_lanes.h"
#include "crypto/sha512_lanes.h"
#include "pyenclave/gcm.h"
#include "pyenclave/measure.h"
#include "pyenclave/page.h"

#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define BATCH 64
#define ENCLAVES 16
#define ROUNDS 3000
#define CHAIN 300

static int counter = -1;

static void open_counter(void)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_HARDWARE,
        .size = sizeof(attr),
        .config = PERF_COUNT_HW_CPU_CYCLES,
        .exclude_kernel = 1,
        .exclude_hv = 1,
    };

    counter = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double counted(void)
{
    uint64_t value = 0;

    if (counter < 0) {
        return now();
    }
    return read(counter, &value, sizeof(value)) == sizeof(value) ? (double)value : 0;
}

/* Nanoseconds of one cycle; 1 if cycles are counted. */
static double cycle(void)
{
    uint64_t x = 3;

    if (counter >= 0) {
        return 1;
    }
    const double start = now();
    for (int i = 0; i < CHAIN; i++) {
#define M "imul %0, %0\n\t"
        __asm__ volatile(M M M M M M M M M M : "+r"(x));
    }
    return (now() - start) / (CHAIN * 10 * 3);
}

/* Best of many rounds: cycles of one of `units`. */
static double measure(void (*work)(void), double units)
{
    double best = 1e30;
    double best_cycle = 1e30;

    for (int i = 0; i < ROUNDS; i++) {
        const double length = cycle();
        const double start = counted();

        work();
        const double took = (counted() - start) / units;
        best = took < best ? took : best;
        best_cycle = length < best_cycle ? length : best_cycle;
    }
    return best / best_cycle;
}

static uint8_t *in;
static uint8_t *out;
static uint8_t tags[16 * BATCH];
static uint64_t first = 1;
static pye_page_key *key;
static pye_gcm_key *gcm;
static const pye_page_info info = {0, 3, 2};

static void must(pye_status rc)
{
    if (rc != PYE_OK) {
        fprintf(stderr, "%s\n", pye_status_name(rc));
        exit(1);
    }
}

static void seal_one(void)
{
    for (int i = 0; i < 16; i++) {
        must(pye_page_seal(key, out, tags, &first, in, &info));
    }
}

static void open_one(void)
{
    for (int i = 0; i < 16; i++) {
        must(pye_page_open(key, in + PAGE, out, tags, first, &info));
    }
}

static void seal_batch(void)
{
    must(pye_pages_seal(key, out, tags, &first, in, BATCH, &info));
}

static void open_batch(void)
{
    must(pye_pages_open(key, in, out, tags, NULL, first, BATCH, &info));
}

static void seal_64_bytes(void)
{
    uint8_t iv[12] = {0};

    for (uint8_t i = 0; i < 100; i++) {
        iv[0] = i;
        must(pye_gcm_seal(gcm, out, tags, iv, in, 64, NULL, 0));
    }
}

static void gcm_row(const char *name, uint32_t implementation, size_t secret_len)
{
    static uint8_t secret[32];
    static uint8_t enclave[16];

    memset(secret, 7, sizeof(secret));
    if (pye_page_key_init(key, secret, secret_len, enclave, implementation) != PYE_OK) {
        return;
    }
    must(pye_gcm_init(gcm, secret, secret_len, implementation));
    seal_one();
    const double one = measure(seal_one, 16);
    const double opened = measure(open_one, 16);
    const double sealed = measure(seal_batch, BATCH);
    const double batch = measure(open_batch, BATCH);
    const double small = measure(seal_64_bytes, 100);
    printf("aes-%d-gcm %s %.0f %.0f %.0f %.0f %.0f\n", (int)secret_len * 8, name, one, opened,
           sealed, batch, small);
    pye_page_key_destroy(key);
    pye_gcm_wipe(gcm);
}

static void one_enclave(void)
{
    pye_sgx_measure ctx;

    must(pye_sgx_create(&ctx, 1 << 20, 1));
    must(pye_sgx_add_pages(&ctx, in, 8, 0, 0x203, 1));
}

static void many_enclaves(void)
{
    static pye_sgx_measure ctx[ENCLAVES];
    static pye_sgx_run runs[ENCLAVES];
    static pye_sgx_job jobs[ENCLAVES];

    for (size_t i = 0; i < ENCLAVES; i++) {
        must(pye_sgx_create(&ctx[i], 1 << 20, 1));
        runs[i] = (pye_sgx_run){in + i * PAGE, 8, 0, 0x203};
        jobs[i] = (pye_sgx_job){&ctx[i], &runs[i], 1};
    }
    must(pye_sgx_add_many(jobs, ENCLAVES));
}

#if defined(__x86_64__)
static void sha384_of_eight(void)
{
    static uint8_t digests[8][PYE_SHA384_SIZE];
    uint8_t *to[8];
    const uint8_t *from[8];

    for (size_t i = 0; i < 8; i++) {
        to[i] = digests[i];
        from[i] = in + i * PAGE;
    }
    pye_sha384_pages_x8_avx512(to, from);
}
#endif

int main(void)
{
    open_counter();
    in = aligned_alloc(64, BATCH * PAGE);
    out = aligned_alloc(64, BATCH * PAGE);
    key = aligned_alloc(PYE_PAGE_KEY_ALIGN, pye_page_key_size());
    gcm = aligned_alloc(PYE_GCM_KEY_ALIGN, pye_gcm_key_size());
    memset(in, 5, BATCH * PAGE);
    printf("cycles %s\n", counter < 0 ? "chain" : "counted");
    for (size_t secret_len = 32; secret_len >= 16; secret_len -= 16) {
#if defined(__x86_64__)
        gcm_row("vaes512", PYE_GCM_VAES512, secret_len);
        gcm_row("vaes256", PYE_GCM_VAES256, secret_len);
        gcm_row("aesni", PYE_GCM_AESNI, secret_len);
#endif
    }
    printf("mrenclave one %.0f\n", measure(one_enclave, 8));
    const uint32_t features = pye_cpu_features();
#if defined(__x86_64__)
    static const uint32_t masks[] = {PYE_CPU_SHANI_FAST, PYE_CPU_AVX512,
                                     PYE_CPU_SHANI_FAST | PYE_CPU_AVX512};

    for (size_t i = 0; i < sizeof(masks) / sizeof(masks[0]); i++) {
        pye_cpu_set_mask(~masks[i]);
        printf("mrenclave %s_of_16 %.0f\n", pye_sgx_many_variant(),
               measure(many_enclaves, 8 * ENCLAVES));
        pye_cpu_set_mask(~(uint32_t)0);
    }
#else
    printf("mrenclave %s_of_16 %.0f\n", pye_sgx_many_variant(),
           measure(many_enclaves, 8 * ENCLAVES));
#endif
#if defined(__x86_64__)
    if (features & PYE_CPU_AVX512) {
        printf("sha384 avx512 %.0f\n", measure(sha384_of_eight, 8));
    }
#endif
    return 0;
}
