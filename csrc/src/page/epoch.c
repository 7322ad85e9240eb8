/* epoch.c - page keys that outlive their counter: the keys of epochs, made of one secret. */
#include "base/check.h"
#include "page/page_impl.h"
#include "pyenclave/epoch.h"
#include "pyenclave/hash.h"

#include <string.h>

#define COUNTER_MASK ((UINT64_C(1) << PYE_EPOCH_SHIFT) - 1)
#define NO_EPOCH UINT64_MAX

_Static_assert(PYE_PAGE_MAX_PAGES < COUNTER_MASK, "a counter does not reach the epoch");
_Static_assert(PYE_EPOCH_LAST == UINT64_MAX >> PYE_EPOCH_SHIFT, "as many epochs as there are bits");

/* Memory wiped in a forked child is zero, and no state of a key. */
enum { LIVE = 1, ENDED = 2 };

struct pye_epoch_key {
    _Alignas(PYE_PAGE_KEY_ALIGN) uint32_t state;
    uint32_t allowed;
    uint64_t now;   /* the epoch of the first key */
    uint64_t other; /* the epoch of the second, or NO_EPOCH */
    uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE];
    uint8_t secret[PYE_EPOCH_SECRET_SIZE];
    /* two page keys follow */
};

size_t pye_epoch_key_size(void)
{
    return sizeof(pye_epoch_key) + 2 * pye_page_key_size();
}

/* key_at returns the key of this epoch (0) or of the other (1). */
static pye_page_key *key_at(pye_epoch_key *key, size_t which)
{
    uint8_t *keys = (uint8_t *)(key + 1) + which * pye_page_key_size();

    return (pye_page_key *)(void *)keys; /* aligned: both sizes are multiples of the alignment */
}

/* make puts the key of `epoch` at `out`. */
static pye_status make(const pye_epoch_key *key, pye_page_key *out, uint64_t epoch)
{
    static const char label[] = "pyenclave page epoch";
    enum { LABEL_SIZE = sizeof(label) - 1 }; /* without the NUL */
    uint8_t info[LABEL_SIZE + 8];            /* not secret, not wiped */
    uint8_t secret[PYE_EPOCH_SECRET_SIZE];

    memcpy(info, label, LABEL_SIZE);
    for (size_t i = 0; i < 8; i++) {
        info[LABEL_SIZE + i] = (uint8_t)(epoch >> (8 * i));
    }
    pye_status rc = pye_hkdf_sha256_expand(secret, sizeof(secret), key->secret,
                                           sizeof(key->secret), info, sizeof(info));
    if (rc == PYE_OK) {
        rc = pye_page_key_init(out, secret, sizeof(secret), key->enclave, key->allowed);
    }
    page_key_set_base(out, epoch << PYE_EPOCH_SHIFT);
    pye_wipe(secret, sizeof(secret));
    return rc;
}

pye_status pye_epoch_key_init(pye_epoch_key *key, const uint8_t secret[PYE_EPOCH_SECRET_SIZE],
                              const uint8_t enclave[PYE_PAGE_ENCLAVE_SIZE], uint32_t allowed)
{
    PYE_REFUSE_IF(key == NULL || secret == NULL || enclave == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF((uintptr_t)key % PYE_PAGE_KEY_ALIGN != 0, PYE_E_ALIGNMENT);
    memset(key, 0, pye_epoch_key_size());
    key->allowed = allowed;
    key->other = NO_EPOCH;
    memcpy(key->enclave, enclave, PYE_PAGE_ENCLAVE_SIZE);
    memcpy(key->secret, secret, PYE_EPOCH_SECRET_SIZE);
    const pye_status rc = make(key, key_at(key, 0), 0);
    if (PYE_GUARD(rc != PYE_OK)) {
        pye_wipe(key, sizeof(*key));
        return rc;
    }
    key->state = LIVE;
    return PYE_OK;
}

void pye_epoch_key_destroy(pye_epoch_key *key)
{
    if (key == NULL || key->state != LIVE) {
        return;
    }
    key->state = ENDED;
    pye_wipe(key->secret, sizeof(key->secret));
    pye_page_key_destroy(key_at(key, 0));
    pye_page_key_destroy(key_at(key, 1)); /* of zeroes, if there is none */
}

static pye_status check_state(const pye_epoch_key *key)
{
    PYE_REFUSE_IF(key == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(key->state == 0, PYE_E_STATE);
    PYE_REFUSE_IF(key->state != LIVE, PYE_E_CLOSED);
    return PYE_OK;
}

/* advance begins `epoch`, which is beyond this one. The key that was is made anew when a page of
 * its time is opened. */
static pye_status advance(pye_epoch_key *key, uint64_t epoch)
{
    if (PYE_GUARD(epoch > PYE_EPOCH_LAST)) {
        pye_epoch_key_destroy(key);
        return PYE_E_LIMIT;
    }
    pye_page_key_destroy(key_at(key, 0));
    key->now = epoch;
    const pye_status rc = make(key, key_at(key, 0), epoch);
    if (PYE_GUARD(rc != PYE_OK)) {
        pye_epoch_key_destroy(key);
    }
    return rc;
}

pye_status pye_epoch_to_seal(pye_epoch_key *key, pye_page_key **out, uint64_t num_pages)
{
    PYE_REFUSE_IF(out == NULL, PYE_E_ARGUMENT);
    *out = NULL;
    PYE_TRY(check_state(key));
    PYE_REFUSE_IF(num_pages == 0 || num_pages > PYE_PAGE_MAX_PAGES, PYE_E_LENGTH);
    if (num_pages > PYE_PAGE_MAX_PAGES - pye_page_key_sealed(key_at(key, 0))) {
        PYE_TRY(advance(key, key->now + 1));
    }
    *out = key_at(key, 0);
    return PYE_OK;
}

pye_status pye_epoch_to_open(pye_epoch_key *key, pye_page_key **out, uint64_t version)
{
    const uint64_t epoch = version >> PYE_EPOCH_SHIFT;

    PYE_REFUSE_IF(out == NULL, PYE_E_ARGUMENT);
    *out = NULL;
    PYE_TRY(check_state(key));
    PYE_REFUSE_IF(epoch > key->now, PYE_E_ARGUMENT);
    if (epoch == key->now) {
        *out = key_at(key, 0);
        return PYE_OK;
    }
    if (epoch != key->other) {
        key->other = NO_EPOCH;
        pye_page_key_destroy(key_at(key, 1));
        PYE_TRY(make(key, key_at(key, 1), epoch));
        key->other = epoch;
    }
    *out = key_at(key, 1);
    return PYE_OK;
}

pye_status pye_epoch_jobs_open(pye_epoch_key *key, const pye_page_job *jobs, size_t num_jobs)
{
    pye_status rc = PYE_OK;
    pye_page_key *of;

    PYE_REFUSE_IF(jobs == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_jobs == 0, PYE_E_LENGTH);
    for (size_t i = 0, n; i < num_jobs && rc == PYE_OK; i += n) {
        n = 1;
        while (i + n < num_jobs &&
               jobs[i + n].version >> PYE_EPOCH_SHIFT == jobs[i].version >> PYE_EPOCH_SHIFT) {
            n++;
        }
        rc = pye_epoch_to_open(key, &of, jobs[i].version);
        if (rc == PYE_OK) {
            rc = pye_page_jobs_open(of, jobs + i, n);
        }
    }
    /* A group that was refused is zero; those that were opened before it are not. */
    if (PYE_GUARD(rc == PYE_E_AUTH)) {
        for (size_t i = 0; i < num_jobs; i++) {
            pye_wipe(jobs[i].out, PYE_PAGE_SIZE);
        }
    }
    return rc;
}

pye_status pye_epoch_pages_open(pye_epoch_key *key, uint8_t *out, const uint8_t *in,
                                const uint8_t *tags, const uint64_t *versions, size_t num_pages,
                                const pye_page_info *first)
{
    pye_status rc = PYE_OK;
    pye_page_key *of;

    PYE_REFUSE_IF(versions == NULL || first == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num_pages == 0, PYE_E_LENGTH);
    for (size_t i = 0, n; i < num_pages && rc == PYE_OK; i += n) {
        pye_page_info info = *first;

        info.address += (uint64_t)i * PYE_PAGE_SIZE;
        n = 1;
        while (i + n < num_pages &&
               versions[i + n] >> PYE_EPOCH_SHIFT == versions[i] >> PYE_EPOCH_SHIFT) {
            n++;
        }
        rc = pye_epoch_to_open(key, &of, versions[i]);
        if (rc == PYE_OK) {
            rc = pye_pages_open(of, out + i * PYE_PAGE_SIZE, in + i * PYE_PAGE_SIZE,
                                tags + i * PYE_PAGE_TAG_SIZE, versions + i, 0, n, &info);
        }
    }
    if (PYE_GUARD(rc == PYE_E_AUTH)) {
        pye_wipe(out, num_pages * PYE_PAGE_SIZE);
    }
    return rc;
}

uint64_t pye_epoch_number(const pye_epoch_key *key)
{
    return key->now;
}

pye_status pye_epoch_skip(pye_epoch_key *key, uint64_t next)
{
    const uint64_t epoch = next >> PYE_EPOCH_SHIFT;
    const uint64_t counter = next & COUNTER_MASK;

    PYE_TRY(check_state(key));
    PYE_REFUSE_IF(epoch < key->now || counter == 0 || counter > PYE_PAGE_MAX_PAGES + 1,
                  PYE_E_ARGUMENT);
    if (epoch > key->now) {
        PYE_TRY(advance(key, epoch));
    }
    return pye_page_key_skip(key_at(key, 0), counter);
}
