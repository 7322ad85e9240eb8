/* gcm.c - choice of the implementation, checks of arguments and of the tag. */
#include "base/check.h"
#include "crypto/gcm_impl.h"

_Static_assert(sizeof(pye_gcm_key) % PYE_GCM_KEY_ALIGN == 0, "keys may stand in an array");

/* From slowest to fastest. */
static const gcm_implementation *const implementations[] = {
    &pye_gcm_portable,
#if defined(__x86_64__)
    &pye_gcm_aesni,
    &pye_gcm_vaes256,
    &pye_gcm_vaes512,
#elif defined(__aarch64__)
    &pye_gcm_armv8,
#endif
};

#define NUM_IMPLEMENTATIONS (sizeof(implementations) / sizeof(implementations[0]))

uint32_t pye_gcm_implementations(void)
{
    const uint32_t features = pye_cpu_features();
    uint32_t set = 0;

    for (size_t i = 0; i < NUM_IMPLEMENTATIONS; i++) {
        if ((implementations[i]->features & ~features) == 0) {
            set |= implementations[i]->id;
        }
    }
    return set;
}

size_t pye_gcm_key_size(void)
{
    return sizeof(pye_gcm_key);
}

pye_status pye_gcm_init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len,
                        uint32_t allowed)
{
    const gcm_implementation *chosen = NULL;

    PYE_REFUSE_IF(key == NULL || secret == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF((uintptr_t)key % PYE_GCM_KEY_ALIGN != 0, PYE_E_ALIGNMENT);
    PYE_REFUSE_IF(secret_len != 16 && secret_len != 32, PYE_E_LENGTH);
    allowed &= pye_gcm_implementations();
    for (size_t i = 0; i < NUM_IMPLEMENTATIONS; i++) {
        if (allowed & implementations[i]->id) {
            chosen = implementations[i];
        }
    }
    PYE_REFUSE_IF(chosen == NULL, PYE_E_UNSUPPORTED);
    chosen->init(key, secret, secret_len);
    chosen->clean();
    key->implementation = chosen;
    return PYE_OK;
}

void pye_gcm_wipe(pye_gcm_key *key)
{
    if (key != NULL) {
        pye_wipe(key, sizeof(*key));
    }
}

const char *pye_gcm_implementation(const pye_gcm_key *key)
{
    return key == NULL || key->implementation == NULL ? "none" : key->implementation->name;
}

static pye_status check(const pye_gcm_key *key, const uint8_t *out, const uint8_t *tag,
                        const uint8_t *iv, const uint8_t *data, size_t data_len,
                        const uint8_t *aad, size_t aad_len)
{
    PYE_REFUSE_IF(key == NULL || tag == NULL || iv == NULL ||
                      (data_len != 0 && (data == NULL || out == NULL)) ||
                      (aad_len != 0 && aad == NULL),
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF(key->implementation == NULL, PYE_E_STATE);
    PYE_REFUSE_IF(data_len > PYE_GCM_MAX_DATA || aad_len > PYE_GCM_MAX_AAD, PYE_E_LIMIT);
    PYE_REFUSE_IF((out != data && gcm_overlap(out, data_len, data, data_len)) ||
                      gcm_overlap(out, data_len, tag, PYE_GCM_TAG_SIZE),
                  PYE_E_OVERLAP);
    return PYE_OK;
}

pye_status pye_gcm_seal(const pye_gcm_key *key, uint8_t *out, uint8_t tag[PYE_GCM_TAG_SIZE],
                        const uint8_t iv[PYE_GCM_IV_SIZE], const uint8_t *data, size_t data_len,
                        const uint8_t *aad, size_t aad_len)
{
    pye_status rc;

    PYE_CHECK(check(key, out, tag, iv, data, data_len, aad, aad_len));
    key->implementation->seal(key, out, tag, iv, data, data_len, aad, aad_len);
    key->implementation->clean();
done:
    return rc;
}

pye_status pye_gcm_open(const pye_gcm_key *key, uint8_t *out, const uint8_t iv[PYE_GCM_IV_SIZE],
                        const uint8_t *data, size_t data_len, const uint8_t tag[PYE_GCM_TAG_SIZE],
                        const uint8_t *aad, size_t aad_len)
{
    pye_status rc;
    uint8_t computed[PYE_GCM_TAG_SIZE];

    PYE_CHECK(check(key, out, tag, iv, data, data_len, aad, aad_len));
    key->implementation->open(key, out, computed, iv, data, data_len, aad, aad_len);
    key->implementation->clean();
    if (PYE_GUARD(!gcm_tag_equal(tag, computed))) {
        pye_wipe(out, data_len);
        rc = PYE_E_AUTH;
    }
    /* the right tag of a forged message is worth as much as a forgery */
    pye_wipe(computed, sizeof(computed));
done:
    return rc;
}
