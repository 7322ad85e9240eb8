/* wipe.c - zeroing that stays, and comparison in constant time. */
#include "base/public.h"
#include "pyenclave/base.h"

#include <string.h>

void pye_wipe(void *data, size_t len)
{
    if (len != 0) {
        memset(data, 0, len);
        /* The compiler must assume that the zeroes are read, so the memset stays. */
        __asm__ volatile("" : : "r"(data) : "memory");
    }
}

int pye_ct_equal(const void *a, const void *b, size_t len)
{
    const volatile uint8_t *x = a;
    const volatile uint8_t *y = b;
    uint32_t difference = 0;

    for (size_t i = 0; i < len; i++) {
        difference |= (uint32_t)(x[i] ^ y[i]);
    }
    difference = ((difference - 1) >> 31) & 1;
    PYE_PUBLIC(difference);
    return (int)difference;
}
