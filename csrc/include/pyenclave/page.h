/* page.h - sealing pages of 4096 bytes, so that memory outside the enclave may hold them.
 *
 * In kind SGX's EWB and ELDU (Intel SDM vol. 3D): AES-GCM under a key made for one run. The IV is
 * the version of the page; a header of 64 bytes, authenticated and not stored, binds the enclave,
 * address, flags and type. docs/formats/page.md has every byte.
 *
 * The key owns the counter of versions. Sealing returns the version and callers keep it in trusted
 * memory; they never choose it, so no IV is ever used twice. Versions start at 1. When
 * PYE_PAGE_MAX_PAGES are used up, sealing gives PYE_E_LIMIT and the key destroys itself.
 *
 * A key may be used by any number of threads, and destroyed while others use it: they finish, and
 * the last one wipes. It must not be used on both sides of a fork: keep it in memory that a child
 * does not get (MADV_WIPEONFORK, MADV_DONTFORK). Wiped memory is refused with PYE_E_STATE.
 *
 * Shared memory: as gcm.h says, each input byte is read once and no output byte is read back.
 */
#ifndef PYENCLAVE_PAGE_H
#define PYENCLAVE_PAGE_H

#include "pyenclave/base.h"

#define PYE_PAGE_SIZE 4096
#define PYE_PAGE_TAG_SIZE 16
#define PYE_PAGE_ENCLAVE_SIZE 16
#define PYE_PAGE_KEY_ALIGN 64
/* 2^36: 2^44 blocks under one key, far below the bounds of SP 800-38D. */
#define PYE_PAGE_MAX_PAGES 68719476736
/* Contiguous batches of at least so many pages bypass the cache when they write. */
#define PYE_PAGE_STREAM_PAGES 256

typedef struct pye_page_key pye_page_key;

/* What a page is, besides its content and version. */
typedef struct {
    uint64_t address; /* any name of its place; a batch advances it by PYE_PAGE_SIZE a page */
    uint32_t flags;   /* permissions and state, as the caller defines them */
    uint8_t type;     /* SGX's page types: 2 is an ordinary page */
} pye_page_info;

/* One page of a scattered batch. */
typedef struct {
    const uint8_t *in;
    uint8_t *out; /* equals `in`, or overlaps no `in` or `out` of the batch */
    uint8_t *tag; /* written when sealing, read when opening */
    uint64_t version; /* written when sealing, read when opening */
    pye_page_info info;
} pye_page_job;

/* pye_page_key_size returns the size of a key in bytes, a multiple of PYE_PAGE_KEY_ALIGN. */
size_t pye_page_key_size(void);

/* pye_page_key_init makes a key of `secret` (16 or 32 fresh random bytes) in memory of
 * pye_page_key_size() bytes aligned to PYE_PAGE_KEY_ALIGN. `enclave` names the enclave. `allowed` is
 * a set of PYE_GCM_ implementations. Statuses are those of pye_gcm_init. The caller wipes
 * `secret`. */
PYE_MUST_USE pye_status pye_page_key_init(pye_page_key *key, const uint8_t *secret,
                                          size_t secret_len,
                                          const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE],
                                          uint32_t allowed);

/* pye_page_key_destroy ends a key: every later call gives PYE_E_CLOSED. It is wiped now, or by the
 * last of the calls that are under way. It may be called twice, and by any thread; NULL is
 * allowed. */
void pye_page_key_destroy(pye_page_key *key);

/* pye_page_key_idle tells whether no call is under way, so that the memory of a destroyed key may
 * be freed. */
int pye_page_key_idle(const pye_page_key *key);

/* pye_page_key_sealed returns how many versions have been given out. */
uint64_t pye_page_key_sealed(const pye_page_key *key);

/* pye_page_key_implementation returns the name of the AES-GCM implementation, or "none". */
const char *pye_page_key_implementation(const pye_page_key *key);

/* pye_page_key_skip gives up all versions below `next`. The counter only moves forward: a smaller
 * `next`, or one beyond PYE_PAGE_MAX_PAGES + 1, gives PYE_E_ARGUMENT. */
PYE_MUST_USE pye_status pye_page_key_skip(pye_page_key *key, uint64_t next);

/* pye_page_seal encrypts one page and returns its new version. `out` equals `in` or does not
 * overlap it. Failures: PYE_E_ARGUMENT, PYE_E_OVERLAP (nothing is written and no version used),
 * PYE_E_STATE, PYE_E_CLOSED, PYE_E_LIMIT. */
PYE_MUST_USE pye_status pye_page_seal(pye_page_key *key, uint8_t out[PYE_PAGE_SIZE],
                                      uint8_t tag[PYE_PAGE_TAG_SIZE], uint64_t *version,
                                      const uint8_t in[PYE_PAGE_SIZE], const pye_page_info *info);

/* pye_page_open authenticates and decrypts one page. `version` must be the one that the caller
 * keeps in trusted memory: an older page is refused. Any change of page, tag, enclave, address,
 * flags, type or version gives PYE_E_AUTH with `out` zeroed. While the call runs, `out` holds
 * plaintext that is not verified yet. */
PYE_MUST_USE pye_status pye_page_open(pye_page_key *key, uint8_t out[PYE_PAGE_SIZE],
                                      const uint8_t in[PYE_PAGE_SIZE],
                                      const uint8_t tag[PYE_PAGE_TAG_SIZE], uint64_t version,
                                      const pye_page_info *info);

/* pye_pages_seal does `num_pages` contiguous pages: page i gets version `*first_version` + i and
 * the address of `first` + i * PYE_PAGE_SIZE, which must not wrap around. `tags` takes 16 bytes a
 * page. Failures as for one page; a refused batch uses no version. */
PYE_MUST_USE pye_status pye_pages_seal(pye_page_key *key, uint8_t *out, uint8_t *tags,
                                       uint64_t *first_version, const uint8_t *in,
                                       size_t num_pages, const pye_page_info *first);

/* pye_pages_open is the inverse. `versions` has one of each page; NULL means `first_version` + i.
 * If one page is refused, every page of `out` is zeroed. */
PYE_MUST_USE pye_status pye_pages_open(pye_page_key *key, uint8_t *out, const uint8_t *in,
                                       const uint8_t *tags, const uint64_t *versions,
                                       uint64_t first_version, size_t num_pages,
                                       const pye_page_info *first);

/* pye_page_jobs_seal and pye_page_jobs_open do the same for pages anywhere. Overlap is checked
 * within each job only. If one page is refused, the `out` of every job is zeroed. */
PYE_MUST_USE pye_status pye_page_jobs_seal(pye_page_key *key, pye_page_job *jobs,
                                           size_t num_jobs);
PYE_MUST_USE pye_status pye_page_jobs_open(pye_page_key *key, const pye_page_job *jobs,
                                           size_t num_jobs);

/* pye_page_header writes the authenticated header of a page (docs/formats/page.md). */
void pye_page_header(uint8_t header[64], const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE],
                     uint64_t version, const pye_page_info *info);

#endif
