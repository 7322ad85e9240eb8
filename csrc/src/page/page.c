/* page.c - page sealing: the counter, the header, and batches for the AES-GCM core. */
#include "base/check.h"
#include "crypto/gcm_impl.h"
#include "page/page_impl.h"
#include "pyenclave/page.h"

#include <stdatomic.h>

_Static_assert(PYE_PAGE_SIZE == GCM_PAGE_SIZE, "one size of page");

/* Pages handed to the core at once: their headers fill a page of stack. */
#define GROUP 32

/* One word holds the next version (bits 0 … 37), the calls under way (38 … 62) and the end (63), so
 * that taking a version and entering is one atomic step. A word of zero is no key: versions start
 * at 1, and memory wiped in a forked child is zero. */
#define VERSION_MASK ((UINT64_C(1) << 38) - 1)
#define ONE_USER (UINT64_C(1) << 38)
#define USERS_MASK (((UINT64_C(1) << 25) - 1) << 38)
#define ENDED (UINT64_C(1) << 63)

_Static_assert(PYE_PAGE_MAX_PAGES + 1 < VERSION_MASK, "the counter cannot reach the users");

struct pye_page_key {
    _Atomic uint64_t word;
    uint64_t base; /* of the epoch: what every version begins at; never changed in use */
    uint64_t enclave[2];
    _Alignas(PYE_PAGE_KEY_ALIGN) pye_gcm_key gcm;
};

size_t pye_page_key_size(void)
{
    return sizeof(pye_page_key);
}

pye_status pye_page_key_init(pye_page_key *key, const uint8_t *secret, size_t secret_len,
                             const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE], uint32_t allowed)
{
    PYE_REFUSE_IF(key == NULL || enclave == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF((uintptr_t)key % PYE_PAGE_KEY_ALIGN != 0, PYE_E_ALIGNMENT);
    PYE_TRY(pye_gcm_init(&key->gcm, secret, secret_len, allowed));
    memcpy(key->enclave, enclave, PYE_PAGE_ENCLAVE_SIZE);
    key->base = 0;
    atomic_store_explicit(&key->word, 1, memory_order_release);
    return PYE_OK;
}

void page_key_set_base(pye_page_key *key, uint64_t base)
{
    key->base = base;
}

/* leave ends a call; the last one out of a destroyed key wipes it. */
static void leave(pye_page_key *key)
{
    const uint64_t before = atomic_fetch_sub_explicit(&key->word, ONE_USER, memory_order_acq_rel);

    if ((before & ENDED) && (before & USERS_MASK) == ONE_USER) {
        pye_gcm_wipe(&key->gcm);
    }
}

/* enter begins a call and takes `num_versions` (0 to open). It does not wait. */
static inline pye_status enter(pye_page_key *key, uint64_t num_versions, uint64_t *first_version)
{
    uint64_t word = atomic_load_explicit(&key->word, memory_order_relaxed);
    uint64_t next;

    do {
        PYE_REFUSE_IF(word == 0, PYE_E_STATE);
        PYE_REFUSE_IF(word & ENDED, PYE_E_CLOSED);
        PYE_REFUSE_IF((word & USERS_MASK) == USERS_MASK, PYE_E_BUSY);
        next = word & VERSION_MASK;
        if (PYE_GUARD(num_versions > PYE_PAGE_MAX_PAGES + 1 - next)) {
            pye_page_key_destroy(key);
            return PYE_E_LIMIT;
        }
    } while (!atomic_compare_exchange_weak_explicit(&key->word, &word,
                                                    word + num_versions + ONE_USER,
                                                    memory_order_acq_rel, memory_order_relaxed));
    *first_version = key->base + next;
    return PYE_OK;
}

void pye_page_key_destroy(pye_page_key *key)
{
    if (key == NULL || atomic_load_explicit(&key->word, memory_order_relaxed) == 0) {
        return;
    }
    const uint64_t before = atomic_fetch_or_explicit(&key->word, ENDED, memory_order_acq_rel);
    /* Tables may not vanish under a running call: half-wiped keys would encrypt with known ones. */
    if (!(before & ENDED) && (before & USERS_MASK) == 0) {
        pye_gcm_wipe(&key->gcm);
    }
}

int pye_page_key_idle(const pye_page_key *key)
{
    return (atomic_load_explicit(&key->word, memory_order_acquire) & USERS_MASK) == 0;
}

uint64_t pye_page_key_sealed(const pye_page_key *key)
{
    const uint64_t next =
        atomic_load_explicit(&key->word, memory_order_relaxed) & VERSION_MASK;

    return next == 0 ? 0 : next - 1;
}

const char *pye_page_key_implementation(const pye_page_key *key)
{
    return pye_gcm_implementation(&key->gcm);
}

pye_status pye_page_key_skip(pye_page_key *key, uint64_t next)
{
    PYE_REFUSE_IF(key == NULL || next > PYE_PAGE_MAX_PAGES + 1, PYE_E_ARGUMENT);
    uint64_t word = atomic_load_explicit(&key->word, memory_order_relaxed);
    do {
        PYE_REFUSE_IF(word == 0 || (word & ENDED), word == 0 ? PYE_E_STATE : PYE_E_CLOSED);
        PYE_REFUSE_IF(next < (word & VERSION_MASK), PYE_E_ARGUMENT);
    } while (!atomic_compare_exchange_weak_explicit(&key->word, &word,
                                                    (word & ~VERSION_MASK) | next,
                                                    memory_order_acq_rel, memory_order_relaxed));
    return PYE_OK;
}

static void store_le(uint8_t *out, uint64_t value, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        out[i] = (uint8_t)(value >> (8 * i));
    }
}

/* The layout is that of docs/formats/page.md. */
static inline void write_header(uint8_t header[GCM_HEADER_SIZE], const void *enclave,
                                uint64_t version, const pye_page_info *info)
{
    memcpy(header, "PYEPAGE1", 8);
    memcpy(header + 8, enclave, PYE_PAGE_ENCLAVE_SIZE);
    store_le(header + 24, info->address, 8);
    store_le(header + 32, version, 8);
    store_le(header + 40, (uint64_t)info->flags | ((uint64_t)info->type << 32), 8);
    memset(header + 48, 0, 16);
}

void pye_page_header(uint8_t header[64], const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE],
                     uint64_t version, const pye_page_info *info)
{
    write_header(header, enclave, version, info);
}

static inline pye_status check_one(const uint8_t *out, const uint8_t *in, const uint8_t *tag)
{
    PYE_REFUSE_IF(out == NULL || in == NULL || tag == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF((out != in && gcm_overlap(out, PYE_PAGE_SIZE, in, PYE_PAGE_SIZE)) ||
                      gcm_overlap(out, PYE_PAGE_SIZE, tag, PYE_PAGE_TAG_SIZE),
                  PYE_E_OVERLAP);
    return PYE_OK;
}

pye_status pye_page_seal(pye_page_key *key, uint8_t out[PYE_PAGE_SIZE],
                         uint8_t tag[PYE_PAGE_TAG_SIZE], uint64_t *version,
                         const uint8_t in[PYE_PAGE_SIZE], const pye_page_info *info)
{
    pye_status rc;
    gcm_page page;

    PYE_REQUIRE(key != NULL && info != NULL && version != NULL, PYE_E_ARGUMENT);
    *version = 0;
    PYE_CHECK(check_one(out, in, tag));
    PYE_CHECK(enter(key, 1, &page.version));
    write_header(page.header, key->enclave, page.version, info);
    page.in = in;
    page.out = out;
    page.tag = tag;
    key->gcm.implementation->seal_pages(&key->gcm, &page, 1, 0);
    key->gcm.implementation->clean();
    *version = page.version;
    leave(key);
done:
    return rc;
}

pye_status pye_page_open(pye_page_key *key, uint8_t out[PYE_PAGE_SIZE],
                         const uint8_t in[PYE_PAGE_SIZE], const uint8_t tag[PYE_PAGE_TAG_SIZE],
                         uint64_t version, const pye_page_info *info)
{
    pye_status rc;
    gcm_page page;
    uint64_t ignored;
    uint8_t computed[PYE_PAGE_TAG_SIZE];

    PYE_REQUIRE(key != NULL && info != NULL, PYE_E_ARGUMENT);
    PYE_CHECK(check_one(out, in, tag));
    PYE_CHECK(enter(key, 0, &ignored));
    page.version = version;
    write_header(page.header, key->enclave, version, info);
    page.in = in;
    page.out = out;
    page.tag = computed;
    key->gcm.implementation->open_pages(&key->gcm, &page, 1, 0);
    key->gcm.implementation->clean();
    if (PYE_GUARD(!gcm_tag_equal(tag, computed))) {
        pye_wipe(out, PYE_PAGE_SIZE);
        rc = PYE_E_AUTH;
    }
    pye_wipe(computed, sizeof(computed));
    leave(key);
done:
    return rc;
}

/* Where the pages of a batch are: in jobs, or one after the other. */
typedef struct {
    const pye_page_job *jobs;
    const uint8_t *in;
    uint8_t *out;
    const uint64_t *versions;
    uint64_t first_version;
    pye_page_info info;
} batch;

static inline void get_page(const pye_page_key *key, const batch *b, int opening, size_t i,
                            gcm_page *page)
{
    if (b->jobs != NULL) {
        const pye_page_job *job = &b->jobs[i];

        page->in = job->in;
        page->out = job->out;
        page->version = opening ? job->version : b->first_version + i;
        write_header(page->header, key->enclave, page->version, &job->info);
    } else {
        pye_page_info info = b->info;

        info.address += (uint64_t)i * PYE_PAGE_SIZE;
        page->in = b->in + i * PYE_PAGE_SIZE;
        page->out = b->out + i * PYE_PAGE_SIZE;
        page->version = b->versions != NULL ? b->versions[i] : b->first_version + i;
        write_header(page->header, key->enclave, page->version, &info);
    }
}

static void seal_batch(const pye_page_key *key, const batch *b, uint8_t *tags, size_t num_pages,
                       int stream)
{
    gcm_page pages[GROUP];

    for (size_t done = 0; done < num_pages;) {
        const size_t group = num_pages - done < GROUP ? num_pages - done : GROUP;

        for (size_t i = 0; i < group; i++) {
            get_page(key, b, 0, done + i, &pages[i]);
            pages[i].tag = b->jobs != NULL ? b->jobs[done + i].tag
                                           : tags + (done + i) * PYE_PAGE_TAG_SIZE;
        }
        key->gcm.implementation->seal_pages(&key->gcm, pages, group, stream);
        done += group;
    }
    key->gcm.implementation->clean();
}

static pye_status open_batch(const pye_page_key *key, const batch *b, const uint8_t *tags,
                             size_t num_pages, int stream)
{
    pye_status rc = PYE_OK;
    gcm_page pages[GROUP];
    uint8_t computed[GROUP][PYE_PAGE_TAG_SIZE];

    for (size_t done = 0; done < num_pages && rc == PYE_OK;) {
        const size_t group = num_pages - done < GROUP ? num_pages - done : GROUP;

        for (size_t i = 0; i < group; i++) {
            get_page(key, b, 1, done + i, &pages[i]);
            pages[i].tag = computed[i];
        }
        key->gcm.implementation->open_pages(&key->gcm, pages, group, stream);
        for (size_t i = 0; i < group; i++) {
            const uint8_t *tag = b->jobs != NULL ? b->jobs[done + i].tag
                                                 : tags + (done + i) * PYE_PAGE_TAG_SIZE;
            if (PYE_GUARD(!gcm_tag_equal(tag, computed[i]))) {
                rc = PYE_E_AUTH;
            }
        }
        done += group;
    }
    key->gcm.implementation->clean();
    if (rc != PYE_OK) {
        for (size_t i = 0; i < num_pages; i++) {
            pye_wipe(b->jobs != NULL ? b->jobs[i].out : b->out + i * PYE_PAGE_SIZE, PYE_PAGE_SIZE);
        }
    }
    pye_wipe(computed, sizeof(computed));
    return rc;
}

/* check_batch looks at the arguments of a contiguous batch. */
static pye_status check_batch(const uint8_t *out, const uint8_t *in, const uint8_t *tags,
                              size_t num_pages, const pye_page_info *first)
{
    PYE_REFUSE_IF(first == NULL || out == NULL || in == NULL || tags == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_pages == 0 || num_pages > SIZE_MAX / PYE_PAGE_SIZE, PYE_E_LENGTH);
    PYE_REFUSE_IF(first->address > UINT64_MAX - (uint64_t)(num_pages - 1) * PYE_PAGE_SIZE,
                  PYE_E_ARGUMENT);
    const size_t len = num_pages * PYE_PAGE_SIZE;
    PYE_REFUSE_IF((out != in && gcm_overlap(out, len, in, len)) ||
                      gcm_overlap(out, len, tags, num_pages * PYE_PAGE_TAG_SIZE),
                  PYE_E_OVERLAP);
    return PYE_OK;
}

/* Past the cache, stores that bypass it cost half; in place the lines are there anyway. */
static int use_stream(const uint8_t *out, const uint8_t *in, size_t num_pages)
{
    return num_pages >= PYE_PAGE_STREAM_PAGES && out != in && (uintptr_t)out % 64 == 0;
}

pye_status pye_pages_seal(pye_page_key *key, uint8_t *out, uint8_t *tags, uint64_t *first_version,
                          const uint8_t *in, size_t num_pages, const pye_page_info *first)
{
    pye_status rc;
    uint64_t version = 0;

    PYE_REQUIRE(key != NULL && first_version != NULL, PYE_E_ARGUMENT);
    *first_version = 0;
    PYE_CHECK(check_batch(out, in, tags, num_pages, first));
    PYE_CHECK(enter(key, num_pages, &version));
    const batch b = {NULL, in, out, NULL, version, *first};
    seal_batch(key, &b, tags, num_pages, use_stream(out, in, num_pages));
    *first_version = version;
    leave(key);
done:
    return rc;
}

pye_status pye_pages_open(pye_page_key *key, uint8_t *out, const uint8_t *in, const uint8_t *tags,
                          const uint64_t *versions, uint64_t first_version, size_t num_pages,
                          const pye_page_info *first)
{
    pye_status rc;
    uint64_t ignored;

    PYE_REQUIRE(key != NULL, PYE_E_ARGUMENT);
    PYE_CHECK(check_batch(out, in, tags, num_pages, first));
    PYE_CHECK(enter(key, 0, &ignored));
    const batch b = {NULL, in, out, versions, first_version, *first};
    rc = open_batch(key, &b, tags, num_pages, use_stream(out, in, num_pages));
    leave(key);
done:
    return rc;
}

static pye_status check_jobs(const pye_page_job *jobs, size_t num_jobs)
{
    PYE_REFUSE_IF(jobs == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_jobs == 0, PYE_E_LENGTH);
    for (size_t i = 0; i < num_jobs; i++) {
        PYE_TRY(check_one(jobs[i].out, jobs[i].in, jobs[i].tag));
    }
    return PYE_OK;
}

pye_status pye_page_jobs_seal(pye_page_key *key, pye_page_job *jobs, size_t num_jobs)
{
    pye_status rc;
    batch b = {.jobs = jobs};

    PYE_REQUIRE(key != NULL, PYE_E_ARGUMENT);
    PYE_CHECK(check_jobs(jobs, num_jobs));
    PYE_CHECK(enter(key, num_jobs, &b.first_version));
    seal_batch(key, &b, NULL, num_jobs, 0);
    for (size_t i = 0; i < num_jobs; i++) {
        jobs[i].version = b.first_version + i;
    }
    leave(key);
done:
    return rc;
}

pye_status pye_page_jobs_open(pye_page_key *key, const pye_page_job *jobs, size_t num_jobs)
{
    pye_status rc;
    uint64_t ignored;
    const batch b = {.jobs = jobs};

    PYE_REQUIRE(key != NULL, PYE_E_ARGUMENT);
    PYE_CHECK(check_jobs(jobs, num_jobs));
    PYE_CHECK(enter(key, 0, &ignored));
    rc = open_batch(key, &b, NULL, num_jobs, 0);
    leave(key);
done:
    return rc;
}
