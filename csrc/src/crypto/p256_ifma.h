/* p256_ifma.h - what ecdsa.c has of the AVX-512 implementation. Public data only: see ecdsa.h. */
#ifndef PYENCLAVE_P256_IFMA_H
#define PYENCLAVE_P256_IFMA_H

#include "pyenclave/ecdsa.h"

/* Entry [w][j] is (j + 1) 2^(6 w) times the point, affine: X and Y in five limbs each, times R. */
typedef struct {
    uint64_t entry[43][32][10];
} pye_p256_points;

struct pye_p256_table {
    pye_p256_points points;
};

/* pye_p256_points_make returns 0 if `key` is no point of the curve in canonical numbers. */
int pye_p256_points_make(pye_p256_points *to, const uint8_t key[PYE_P256_KEY_SIZE]);

/* pye_p256_verify_four judges up to four signatures, those without a table first; the CPU has
 * the features. */
void pye_p256_verify_four(uint8_t *verdicts, const pye_p256_points *generator,
                           const pye_p256_claim *claims, size_t count);

#endif
