/* native.c - calling a native trusted function with private buffers only. */
#include "base/check.h"
#include "pyenclave/call.h"

#include <string.h>

typedef pye_status (*native_function)(const uint8_t *in, size_t in_len, uint8_t *out,
                                      size_t *out_len);

pye_status pye_native_call(void *function, uint8_t *out, size_t out_cap, size_t *out_len,
                           const uint8_t *in, size_t in_len)
{
    native_function call;
    size_t len = out_cap;

    *out_len = 0;
    memcpy(&call, &function, sizeof(call)); /* ISO C has no cast from data to function pointers */
    const pye_status rc = call(in, in_len, out, &len);
    if (PYE_GUARD(rc != PYE_OK || len > out_cap)) { /* BND-06 */
        /* What a failed function wrote must not become the tail of a later answer (BND-07). */
        pye_wipe(out, out_cap);
        return rc != PYE_OK ? rc : PYE_E_LENGTH;
    }
    *out_len = len;
    return PYE_OK;
}
