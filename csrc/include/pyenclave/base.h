/* base.h - status codes, wiping, constant-time comparison, CPU features. */
#ifndef PYENCLAVE_BASE_H
#define PYENCLAVE_BASE_H

#include <stddef.h>
#include <stdint.h>

#define PYE_MUST_USE __attribute__((warn_unused_result))

typedef int32_t pye_status;

#define PYE_OK 0
/* argument class: the caller's mistake, nothing happened */
#define PYE_E_ARGUMENT 1
#define PYE_E_LENGTH 2
#define PYE_E_ALIGNMENT 3
#define PYE_E_OVERLAP 4
/* state class */
#define PYE_E_STATE 16
#define PYE_E_CLOSED 17
#define PYE_E_FORKED 18
#define PYE_E_BUSY 19
#define PYE_E_POISONED 20
#define PYE_E_PEER_LOST 21
#define PYE_E_TIMEOUT 22
#define PYE_E_PROTOCOL 23
/* authentication class */
#define PYE_E_AUTH 32
/* limit class */
#define PYE_E_LIMIT 48
#define PYE_E_NO_MEMORY 49
/* operating system class: errno tells more */
#define PYE_E_OS 64
#define PYE_E_RANDOM 65
#define PYE_E_DENIED 66
/* unsupported class */
#define PYE_E_UNSUPPORTED 80
#define PYE_E_SELF_TEST 81

/* pye_status_name returns the stable name of `status` ("PYE_E_AUTH"), or "PYE_E_UNKNOWN". */
const char *pye_status_name(pye_status status);
/* pye_status_message returns one sentence on `status`, for people. Never NULL. */
const char *pye_status_message(pye_status status);

/* pye_wipe zeroes `len` bytes at `data` in a way that the compiler may not remove. */
void pye_wipe(void *data, size_t len);
/* pye_ct_equal returns 1 when the `len` bytes at `a` and `b` are equal, else 0, in time that
 * depends on `len` only. */
int pye_ct_equal(const void *a, const void *b, size_t len);

/* CPU features, a word of bits. A vector feature is set only if the operating system saves its
 * registers (XCR0), not if CPUID alone names it. */
#define PYE_CPU_SSSE3 0x01
#define PYE_CPU_AESNI 0x02
#define PYE_CPU_PCLMUL 0x04
#define PYE_CPU_AVX 0x08
#define PYE_CPU_AVX2 0x10
#define PYE_CPU_AVX512 0x20
#define PYE_CPU_VAES 0x40
#define PYE_CPU_VPCLMUL 0x80
#define PYE_CPU_SHANI 0x100
#define PYE_CPU_RDRAND 0x200
#define PYE_CPU_RDPID 0x400
#define PYE_CPU_PKU 0x800
#define PYE_CPU_WAITPKG 0x1000
#define PYE_CPU_BMI2 0x2000
#define PYE_CPU_IFMA 0x4000
#define PYE_CPU_SHANI_FAST 0x8000 /* PYE_CPU_SHANI, and one sha256rnds2 begins every cycle */
#define PYE_CPU_ARM_AES 0x1000000 /* AArch64; the bits above are x86-64's */
#define PYE_CPU_ARM_PMULL 0x2000000
#define PYE_CPU_ARM_SHA2 0x4000000
#define PYE_CPU_ARM_SHA512 0x8000000

/* pye_cpu_features returns what this CPU and system offer, restricted by the mask. Thread-safe. */
uint32_t pye_cpu_features(void);
/* pye_cpu_set_mask lets only the features in `mask` be seen by handles made from now on, so that
 * tests reach every implementation. 0xffffffff lifts it. It concerns the calling module only. */
void pye_cpu_set_mask(uint32_t mask);
/* pye_cpu_feature_name returns the name of the single feature bit `feature`, or NULL. */
const char *pye_cpu_feature_name(uint32_t feature);

#endif
