/*
 * ecdsa.h - ECDSA signatures on P-256 with SHA-256, verified four at a time.
 *
 * For public data only: evidence, certificates, keys that everybody may know. Time and memory
 * accesses depend on all of them, so nothing here may ever see a secret, and nothing here signs.
 *
 * A verdict is VALID, INVALID or DOUBT. DOUBT is said of what this code does not decide: a key that
 * is no point of the curve, and sums that meet a point of infinity or add a point to itself or to
 * its negative, which only signatures made for that purpose do. Whoever gets it asks another
 * implementation.
 *
 * It needs AVX-512 with IFMA (PYE_CPU_AVX512 and PYE_CPU_IFMA); elsewhere tables cannot be made.
 */
#ifndef PYENCLAVE_ECDSA_H
#define PYENCLAVE_ECDSA_H

#include "pyenclave/base.h"

#define PYE_P256_KEY_SIZE 64
#define PYE_P256_SIGNATURE_SIZE 64
#define PYE_P256_DIGEST_SIZE 32

#define PYE_P256_INVALID 0
#define PYE_P256_VALID 1
#define PYE_P256_DOUBT 2

/* Multiples of one point, about 110 KiB. It is not changed after it was made: threads share it. */
typedef struct pye_p256_table pye_p256_table;

/* pye_p256_table_new makes the table of `key` (X and Y, big-endian), or with NULL that of the
 * curve's generator. NULL: no point of the curve, no memory, or not this CPU. About 0.1 ms; worth
 * it for a key of which two or more signatures are verified. */
pye_p256_table *pye_p256_table_new(const uint8_t *key);
void pye_p256_table_free(pye_p256_table *table);

/* One signature, R and S big-endian, over data whose SHA-256 is `digest`. The key is given as 64
 * bytes, or as its table; then `key` is not looked at. */
typedef struct {
    const uint8_t *key;
    const pye_p256_table *table;
    const uint8_t *signature;
    const uint8_t *digest;
} pye_p256_claim;

/* pye_p256_verify judges `count` signatures; `generator` is the generator's table. Keys without a
 * table cost about the same whether one or four are judged. PYE_E_UNSUPPORTED: not this CPU; the
 * verdicts are then all DOUBT. */
PYE_MUST_USE pye_status pye_p256_verify(uint8_t *verdicts, const pye_p256_table *generator,
                                        const pye_p256_claim *claims, size_t count);

/* pye_p256_self_test verifies known signatures, good and bad, with and without a table. */
PYE_MUST_USE pye_status pye_p256_self_test(const pye_p256_table *generator);

#endif
