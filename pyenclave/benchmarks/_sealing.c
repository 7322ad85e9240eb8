/* _sealing.c - what sealing is compared with, in C: a copy past the cache, and intel-ipsec-mb. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static void copy512(uint8_t *out, const uint8_t *in, size_t len)
{
    for (size_t i = 0; i < len; i += 64) {
        _mm512_stream_si512((void *)(out + i), _mm512_loadu_si512(in + i));
    }
}

__attribute__((target("avx"))) static void copy256(uint8_t *out, const uint8_t *in, size_t len)
{
    for (size_t i = 0; i < len; i += 32) {
        _mm256_stream_si256((void *)(out + i), _mm256_loadu_si256((const void *)(in + i)));
    }
}
#endif

/* Copy `len` bytes, a multiple of 64, to an aligned place without filling the cache with them. */
void bench_stream_copy(uint8_t *out, const uint8_t *in, size_t len)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        copy512(out, in, len);
    } else if (__builtin_cpu_supports("avx")) {
        copy256(out, in, len);
    } else {
        for (size_t i = 0; i < len; i += 16) {
            _mm_stream_si128((void *)(out + i), _mm_loadu_si128((const void *)(in + i)));
        }
    }
    _mm_sfence();
#else
    memcpy(out, in, len);
#endif
}

#if defined(BENCH_IPSEC_MB)
#include <intel-ipsec-mb.h>

typedef struct {
    uint64_t address;
    uint32_t flags;
    uint8_t type;
} page_info;

typedef int32_t (*pages_seal)(void *key, uint8_t *out, uint8_t *tags, uint64_t *first_version,
                              const uint8_t *in, size_t num_pages, const page_info *first);

/* pye_pages_seal, `rounds` times; the last version is returned, 0 for a failure. */
uint64_t bench_ours(pages_seal seal, void *key, uint8_t *out, uint8_t *tags, const uint8_t *in,
                    size_t num_pages, size_t rounds)
{
    const page_info info = {0, 0, 2};
    uint64_t version = 0;

    for (size_t round = 0; round < rounds; round++) {
        if (seal(key, out, tags, &version, in, num_pages, &info) != 0) {
            return 0;
        }
    }
    return version;
}

static IMB_MGR *manager;
static struct gcm_key_data key_data __attribute__((aligned(64)));

int bench_ipsec_key(const uint8_t *key)
{
    manager = alloc_mb_mgr(0);
    if (manager == NULL) {
        return 0;
    }
    init_mb_mgr_auto(manager, NULL);
    IMB_AES256_GCM_PRE(manager, key, &key_data);
    return 1;
}

/* The same pages under headers and IVs that were made beforehand: 64 and 12 bytes a page. */
void bench_ipsec(uint8_t *out, uint8_t *tags, const uint8_t *in, const uint8_t *headers,
                 const uint8_t *ivs, size_t num_pages, size_t rounds)
{
    struct gcm_context_data context;

    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < num_pages; i++) {
            IMB_AES256_GCM_ENC(manager, &key_data, &context, out + 4096 * i, in + 4096 * i, 4096,
                               ivs + 12 * i, headers + 64 * i, 64, tags + 16 * i, 16);
        }
    }
}
#endif
