/* epoch.h - page keys that outlive their counter: one secret, a key for each epoch.
 *
 * A page key (page.h) gives out PYE_PAGE_MAX_PAGES versions. What lives longer moves to the next
 * epoch before they end: its key is made of the secret and the epoch's number by HKDF, so pages of
 * any epoch can be opened, however old. A version names its epoch: the counter of the epoch's key
 * in bits 0 … 36, the epoch in bits 40 … 63; versions of one secret never repeat. When there is no
 * next epoch the secret and all keys are destroyed. docs/formats/page.md.
 *
 * One thread at a time, the use of a key that was handed out included. Nothing is allocated and no
 * system call made: a fault handler may use it.
 */
#ifndef PYENCLAVE_EPOCH_H
#define PYENCLAVE_EPOCH_H

#include "pyenclave/base.h"
#include "pyenclave/page.h"

#define PYE_EPOCH_SECRET_SIZE 32
#define PYE_EPOCH_LAST 16777215
#define PYE_EPOCH_SHIFT 40

typedef struct pye_epoch_key pye_epoch_key;

/* pye_epoch_key_size returns the size in bytes, a multiple of PYE_PAGE_KEY_ALIGN. */
size_t pye_epoch_key_size(void);

/* pye_epoch_key_init makes epoch 0 in memory of pye_epoch_key_size() bytes aligned to
 * PYE_PAGE_KEY_ALIGN, which must be as safe as page.h says of a key's (kept from children, dumps,
 * swap): it holds `secret` from now on. The other arguments and statuses are those of
 * pye_page_key_init. The caller wipes its own copy of `secret`. */
PYE_MUST_USE pye_status pye_epoch_key_init(pye_epoch_key *key,
                                           const uint8_t secret[PYE_EPOCH_SECRET_SIZE],
                                           const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE],
                                           uint32_t allowed);

/* pye_epoch_key_destroy wipes the secret and every key; later calls give PYE_E_CLOSED. It may be
 * called twice, and with NULL or wiped memory. */
void pye_epoch_key_destroy(pye_epoch_key *key);

/* pye_epoch_to_seal gives the page key under which `num_pages` (1 … PYE_PAGE_MAX_PAGES) may be
 * sealed now, at the next epoch if this one has fewer versions left; seal at once. Failures:
 * PYE_E_ARGUMENT, PYE_E_LENGTH, PYE_E_STATE (wiped in a fork), PYE_E_CLOSED, PYE_E_LIMIT (after
 * the last epoch: everything is destroyed). */
PYE_MUST_USE pye_status pye_epoch_to_seal(pye_epoch_key *key, pye_page_key **out,
                                          uint64_t num_pages);

/* pye_epoch_to_open gives the page key that opens pages of `version`, until the next call with
 * another epoch. Keys of this epoch and of one other are at hand; a further one is made anew, in
 * microseconds. A version of an epoch that is not reached, or of none: PYE_E_ARGUMENT. */
PYE_MUST_USE pye_status pye_epoch_to_open(pye_epoch_key *key, pye_page_key **out,
                                          uint64_t version);

/* pye_epoch_jobs_open is pye_page_jobs_open for pages of any epochs. */
PYE_MUST_USE pye_status pye_epoch_jobs_open(pye_epoch_key *key, const pye_page_job *jobs,
                                            size_t num_jobs);

/* pye_epoch_pages_open is pye_pages_open for pages of any epochs, each with its version. */
PYE_MUST_USE pye_status pye_epoch_pages_open(pye_epoch_key *key, uint8_t *out, const uint8_t *in,
                                             const uint8_t *tags, const uint64_t *versions,
                                             size_t num_pages, const pye_page_info *first);

/* pye_epoch_number returns the number of this epoch. */
uint64_t pye_epoch_number(const pye_epoch_key *key);

/* pye_epoch_skip gives up all versions below `next`, which is no smaller than the next one; its
 * epoch becomes this epoch. So tests come near the ends. PYE_E_ARGUMENT if it moves back or beyond
 * the end. */
PYE_MUST_USE pye_status pye_epoch_skip(pye_epoch_key *key, uint64_t next);

#endif
