/* gcm.h - AES-GCM (NIST SP 800-38D) with a 96-bit IV and a 128-bit tag. No other sizes exist here.
 *
 * A key lives in memory that the caller provides: pye_gcm_key_size() bytes, aligned to
 * PYE_GCM_KEY_ALIGN. It holds tables that are as secret as the key itself, and should be locked
 * and kept out of dumps and forked children. The implementation is chosen once, at pye_gcm_init.
 *
 * Shared memory: input bytes are read once and output bytes are written once and never read back,
 * so data may lie in memory that an attacker writes at the same time. The result is then that of
 * some bytes which were there; never a tag or plaintext of bytes that were not checked.
 *
 * Threads: a key that is not being initialised or wiped may be used by any number of threads.
 */
#ifndef PYENCLAVE_GCM_H
#define PYENCLAVE_GCM_H

#include "pyenclave/base.h"

#define PYE_GCM_IV_SIZE 12
#define PYE_GCM_TAG_SIZE 16
#define PYE_GCM_KEY_ALIGN 64
/* SP 800-38D, 5.2.1.1: at most 2^39 - 256 bits of data and 2^64 - 1 bits of AAD. */
#define PYE_GCM_MAX_DATA 68719476704
#define PYE_GCM_MAX_AAD 2305843009213693951

/* Implementations, as bits of a set. */
#define PYE_GCM_PORTABLE 1
#define PYE_GCM_AESNI 2
#define PYE_GCM_VAES512 4
#define PYE_GCM_VAES256 8
#define PYE_GCM_ARMV8 16
#define PYE_GCM_ANY 0xffff

typedef struct pye_gcm_key pye_gcm_key;

/* pye_gcm_implementations returns the set that this CPU, restricted by pye_cpu_set_mask, offers. */
uint32_t pye_gcm_implementations(void);

/* pye_gcm_self_test runs known-answer tests of one implementation (some microseconds): both key
 * sizes, tails, pages, and that a changed tag is refused. PYE_E_UNSUPPORTED if the CPU lacks it,
 * PYE_E_SELF_TEST if an answer is wrong: then leave it out of `allowed` for ever. */
PYE_MUST_USE pye_status pye_gcm_self_test(uint32_t implementation);

/* pye_gcm_key_size returns the size of a key in bytes, a multiple of PYE_GCM_KEY_ALIGN. */
size_t pye_gcm_key_size(void);

/* pye_gcm_init makes a key of `secret` (16 or 32 bytes, else PYE_E_LENGTH) for the fastest of the
 * `allowed` implementations that the CPU offers (none: PYE_E_UNSUPPORTED). The caller wipes
 * `secret`. On failure nothing is written. */
PYE_MUST_USE pye_status pye_gcm_init(pye_gcm_key *key, const uint8_t *secret, size_t secret_len,
                                     uint32_t allowed);

/* pye_gcm_wipe destroys a key; no thread may be using it. Later use gives PYE_E_STATE. NULL is
 * allowed. */
void pye_gcm_wipe(pye_gcm_key *key);

/* pye_gcm_implementation returns "portable", "aesni", "vaes256", "vaes512" or "armv8", or "none"
 * for a wiped key. */
const char *pye_gcm_implementation(const pye_gcm_key *key);

/* pye_gcm_seal encrypts `data_len` bytes and writes as many to `out`, and their tag to `tag`.
 * An `iv` must never be used twice under one key: only the caller can see to that (page.h owns its
 * counter). `out` equals `data` or does not overlap it; `tag` does not overlap `out`; otherwise
 * PYE_E_OVERLAP. PYE_E_LIMIT beyond the sizes above. A refusal writes nothing. */
PYE_MUST_USE pye_status pye_gcm_seal(const pye_gcm_key *key, uint8_t *out,
                                     uint8_t tag[PYE_GCM_TAG_SIZE],
                                     const uint8_t iv[PYE_GCM_IV_SIZE], const uint8_t *data,
                                     size_t data_len, const uint8_t *aad, size_t aad_len);

/* pye_gcm_open is the inverse. A wrong tag gives PYE_E_AUTH with `out` zeroed; `out` holds
 * unverified plaintext while the call runs. Overlap as above; `tag` is compared in constant
 * time. */
PYE_MUST_USE pye_status pye_gcm_open(const pye_gcm_key *key, uint8_t *out,
                                     const uint8_t iv[PYE_GCM_IV_SIZE], const uint8_t *data,
                                     size_t data_len, const uint8_t tag[PYE_GCM_TAG_SIZE],
                                     const uint8_t *aad, size_t aad_len);

#endif
