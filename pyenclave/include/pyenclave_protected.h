/*
 * pyenclave_protected.h - memory behind the key, for a library of pyenclave.ProtectedLibrary.
 *
 *     #include <pyenclave_protected.h>
 *     #include <pyenclave_trusted.h>
 *
 *     PYE_PROTECTED_MEMORY;                       (in one file of the library)
 *
 *     uint8_t *table = pye_protected_take(65536); (in a function)
 *
 * Variables and stacks of the library are behind the key by themselves. malloc's memory is not: it
 * is the process's. The same library works inside an enclave, where all memory is the enclave's.
 */
#ifndef PYENCLAVE_PROTECTED_H
#define PYENCLAVE_PROTECTED_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    uint64_t start; /* 0: not loaded as a protected library */
    uint64_t size;
    uint64_t used;
} pye_protected_arena;

#ifdef __cplusplus
extern "C" __attribute__((visibility("default"))) pye_protected_arena pye_protected_memory;
#define PYE_PROTECTED_MEMORY pye_protected_arena pye_protected_memory = {0, 0, 0}
#else
extern __attribute__((visibility("default"))) pye_protected_arena pye_protected_memory;
#define PYE_PROTECTED_MEMORY pye_protected_arena pye_protected_memory = {0, 0, 0}
#endif

/* pye_protected_take returns `size` zero bytes, aligned to 64, for as long as the library is
 * loaded, or NULL: there are none left. Thread-safe. Outside a protected library: calloc's. */
static inline void *pye_protected_take(size_t size)
{
    const uint64_t size_of_all = pye_protected_memory.size;
    uint64_t used = __atomic_load_n(&pye_protected_memory.used, __ATOMIC_RELAXED);
    uint64_t whole;

    if (pye_protected_memory.start == 0) {
        return calloc(1, size == 0 ? 1 : size);
    }
    do {
        if (size > size_of_all || (whole = ((uint64_t)size + 63) / 64 * 64) > size_of_all - used) {
            return NULL;
        }
    } while (!__atomic_compare_exchange_n(&pye_protected_memory.used, &used, used + whole, 0,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return (void *)(uintptr_t)(pye_protected_memory.start + used);
}

#endif
