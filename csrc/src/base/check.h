/* check.h - the house's error flow: a failing status goes to the one `done:` label. */
#ifndef PYE_SRC_BASE_CHECK_H
#define PYE_SRC_BASE_CHECK_H

#include "pyenclave/base.h"

#define PYE_CHECK(call)                                                                            \
    do {                                                                                           \
        rc = (call);                                                                               \
        if (rc != PYE_OK) {                                                                        \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#define PYE_REQUIRE(condition, status)                                                             \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            rc = (status);                                                                         \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#endif
