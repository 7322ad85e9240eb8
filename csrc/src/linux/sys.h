/* sys.h - what the files of this folder share: errno to status, and numbers that older system
 * headers lack. System call numbers above 424 are the same on every architecture. */
#ifndef PYE_SRC_LINUX_SYS_H
#define PYE_SRC_LINUX_SYS_H

#include "pyenclave/base.h"

#include <errno.h>

#define PYE_NR_PIDFD_SEND_SIGNAL 424
#define PYE_NR_PIDFD_OPEN 434
#define PYE_NR_CLOSE_RANGE 436
#define PYE_NR_PIDFD_GETFD 438
#define PYE_NR_LANDLOCK_CREATE 444
#define PYE_NR_LANDLOCK_RESTRICT 446
#define PYE_NR_MEMFD_SECRET 447

/* pye_os_status is the status of a system call that failed with `error`. */
static inline pye_status pye_os_status(int error)
{
    switch (error) {
    case EPERM:
    case EACCES:
        return PYE_E_DENIED;
    case ENOSYS:
        return PYE_E_UNSUPPORTED;
    case ENOMEM:
        return PYE_E_NO_MEMORY;
    default:
        return PYE_E_OS;
    }
}

/* pye_os_result turns the result of a system call (negative: failed) into a status. */
static inline pye_status pye_os_result(long result)
{
    return result < 0 ? pye_os_status(errno) : PYE_OK;
}

#endif
