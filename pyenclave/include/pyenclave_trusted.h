/*
 * pyenclave_trusted.h - native code that runs inside an enclave.
 *
 *     #include <pyenclave_trusted.h>
 *
 *     PYE_ECALL(add_one)
 *     {
 *         if (in_len > *out_len) {
 *             return PYE_ECALL_TOO_LONG;
 *         }
 *         for (size_t i = 0; i < in_len; i++) {
 *             out[i] = (uint8_t)(in[i] + 1);
 *         }
 *         *out_len = in_len;
 *         return PYE_ECALL_OK;
 *     }
 *
 *     gcc -O2 -shared -fPIC -I"$(python -c 'import pyenclave; print(pyenclave.get_include())')" \
 *         -o libadd.so add.c
 *
 * `in` is a private copy of what the host sent: it cannot change during the call. `out` has room
 * for `*out_len` bytes and does not overlap `in`; set `*out_len` to the bytes of the answer. Both
 * buffers are aligned to 64 bytes and belong to the call only. Functions run on the enclave's
 * threads, several at once if the image has several, and without Python's lock.
 *
 * Statuses 1 and 2 become an ArgumentError on the host, any other but PYE_ECALL_OK an EcallError;
 * nothing of `out` is sent then, and `out` is wiped. Bytes that a function writes beyond the length
 * that it answers stay in the buffer of its thread: write no more than you answer.
 */
#ifndef PYENCLAVE_TRUSTED_H
#define PYENCLAVE_TRUSTED_H

#include <stddef.h>
#include <stdint.h>

#ifndef PYENCLAVE_BASE_H
typedef int32_t pye_status;
#endif

#define PYE_ECALL_OK 0
/* The input is not what the function wants. */
#define PYE_ECALL_ARGUMENT 1
/* The input has a wrong length, or the answer does not fit. */
#define PYE_ECALL_TOO_LONG 2
/* Codes from here on are the function's own; the host sees the number. */
#define PYE_ECALL_USER 1000

#ifdef __cplusplus
#define PYE_ECALL_LINKAGE extern "C"
#else
#define PYE_ECALL_LINKAGE
#endif

/* PYE_ECALL(name) begins the definition of the trusted function `name`. */
#define PYE_ECALL(name)                                                                            \
    PYE_ECALL_LINKAGE __attribute__((visibility("default"))) pye_status pye_ecall_##name(          \
        const uint8_t *in, size_t in_len, uint8_t *out, size_t *out_len);                          \
    PYE_ECALL_LINKAGE pye_status pye_ecall_##name(const uint8_t *in, size_t in_len, uint8_t *out,  \
                                                  size_t *out_len)

#endif
