/* check.h - the house's error flow, and the one way to write a check.
 *
 * Every check of the core is one use of a macro of this file, so that a script can number them and
 * a test build (PYE_MUTATION) can make any single one pass: a check whose absence no test notices
 * is not tested. docs/proofs.md. In every other build the macros are the plain `if` they stand for.
 *
 *   PYE_CHECK(call)                 a failing status goes to `done:`, in `rc`
 *   PYE_REQUIRE(condition, status)  what must hold, else `status` goes to `done:`, in `rc`
 *   PYE_TRY(call)                   a failing status is returned: nothing is to be cleaned up
 *   PYE_REFUSE_IF(condition, result) what must not be, else `result` is returned
 *   if (PYE_GUARD(condition)) {...} the same, where more is to be done before returning
 */
#ifndef PYE_SRC_BASE_CHECK_H
#define PYE_SRC_BASE_CHECK_H

#include "pyenclave/base.h"

#if defined(PYE_MUTATION)

/* One for each use of a macro; the linker puts them side by side. tests/native/proof_core.c. */
typedef struct {
    const char *file;
    int32_t line;
    uint32_t number;
} pye_check_site;

/* pye_check_stops notes that the check at `site` fired. 0: it is the one that must not stop. */
int pye_check_stops(const pye_check_site *site);

#define PYE_GUARD(condition)                                                                       \
    (__extension__({                                                                               \
        static pye_check_site site_                                                                \
            __attribute__((used, aligned(8), section("pye_checks"))) = {__FILE__, __LINE__, 0};    \
        (condition) && pye_check_stops(&site_);                                                    \
    }))

#else
#define PYE_GUARD(condition) (condition)
#endif

#define PYE_CHECK(call)                                                                            \
    do {                                                                                           \
        rc = (call);                                                                               \
        if (PYE_GUARD(rc != PYE_OK)) {                                                             \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#define PYE_REQUIRE(condition, status)                                                             \
    do {                                                                                           \
        if (PYE_GUARD(!(condition))) {                                                             \
            rc = (status);                                                                         \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#define PYE_TRY(call)                                                                              \
    do {                                                                                           \
        const pye_status tried_ = (call);                                                          \
        if (PYE_GUARD(tried_ != PYE_OK)) {                                                         \
            return tried_;                                                                         \
        }                                                                                          \
    } while (0)

#define PYE_REFUSE_IF(condition, result)                                                           \
    do {                                                                                           \
        if (PYE_GUARD(condition)) {                                                                \
            return (result);                                                                       \
        }                                                                                          \
    } while (0)

#endif
