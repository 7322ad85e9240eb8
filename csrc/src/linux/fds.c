/* fds.c - which descriptors a process has, and whether shared memory from a peer is safe to map. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(PYE_SEAL_SEAL == F_SEAL_SEAL && PYE_SEAL_SHRINK == F_SEAL_SHRINK &&
                   PYE_SEAL_GROW == F_SEAL_GROW && PYE_SEAL_WRITE == F_SEAL_WRITE,
               "seals, linux/fcntl.h");

#define MAX_KEEP 256

pye_status pye_fd_check_memfd(int fd, uint64_t size, uint32_t seals, uint64_t *out_size)
{
    struct stat stat;
    int found;

    *out_size = 0;
    PYE_REFUSE_IF((seals & PYE_SEAL_SHRINK) == 0, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(fstat(fd, &stat) != 0, PYE_E_OS);
    /* Files of a tmpfs have seals too, but carry SEAL alone, so SHRINK is never among them; a
     * memfd has no name. Anything else answers EINVAL. */
    found = fcntl(fd, F_GET_SEALS);
    if (PYE_GUARD(!S_ISREG(stat.st_mode) || stat.st_nlink != 0 || found < 0 ||
                  ((uint32_t)found & seals) != seals)) {
        errno = EPERM;
        return PYE_E_DENIED;
    }
    PYE_REFUSE_IF(stat.st_size <= 0 || (size != 0 && (uint64_t)stat.st_size != size), PYE_E_LENGTH);
    *out_size = (uint64_t)stat.st_size;
    return PYE_OK;
}

static pye_status close_range_of(unsigned int first, unsigned int last)
{
    return first > last ? PYE_OK : pye_os_result(syscall(PYE_NR_CLOSE_RANGE, first, last, 0));
}

pye_status pye_fds_close_except(const int *keep, size_t num_keep)
{
    int sorted[MAX_KEEP];
    size_t count = 0;
    unsigned int first = 0;

    PYE_REFUSE_IF(num_keep > MAX_KEEP, PYE_E_ARGUMENT);
    for (size_t i = 0; i < num_keep; i++) {
        size_t at = count;

        if (keep[i] < 0) {
            continue;
        }
        while (at > 0 && sorted[at - 1] > keep[i]) {
            sorted[at] = sorted[at - 1];
            at--;
        }
        sorted[at] = keep[i];
        count++;
    }
    for (size_t i = 0; i < count; i++) {
        const unsigned int kept = (unsigned int)sorted[i];

        if (kept > first) {
            PYE_TRY(close_range_of(first, kept - 1));
        }
        first = kept + 1;
    }
    return close_range_of(first, ~0u);
}

#endif
