/* process.c - other processes: waiting for their end, and trying to read them. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#if defined(__linux__)

#include <limits.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

pye_status pye_pidfd_open(int *out_fd, int64_t pid)
{
    *out_fd = -1;
    PYE_REFUSE_IF(pid <= 0 || pid > INT_MAX, PYE_E_ARGUMENT);
    *out_fd = (int)syscall(PYE_NR_PIDFD_OPEN, (int)pid, 0);
    return pye_os_result(*out_fd);
}

pye_status pye_pidfd_wait(int pidfd, uint32_t timeout_ms)
{
    struct pollfd poll_fd = {.fd = pidfd, .events = POLLIN};
    const int timeout = timeout_ms > INT_MAX ? INT_MAX : (int)timeout_ms;
    int ready;

    if (PYE_GUARD(pidfd < 0)) { /* poll would ignore it and wait */
        errno = EBADF;
        return PYE_E_OS;
    }
    ready = poll(&poll_fd, 1, timeout);
    PYE_REFUSE_IF(ready < 0, errno == EINTR ? PYE_E_BUSY : pye_os_status(errno));
    PYE_REFUSE_IF(ready == 0, PYE_E_TIMEOUT);
    if (PYE_GUARD((poll_fd.revents & POLLIN) == 0)) {
        errno = EBADF;
        return PYE_E_OS;
    }
    return PYE_OK;
}

pye_status pye_pidfd_kill(int pidfd, int signal)
{
    return pye_os_result(syscall(PYE_NR_PIDFD_SEND_SIGNAL, pidfd, signal, NULL, 0));
}

pye_status pye_pidfd_steal(int *out_fd, int pidfd, int target)
{
    *out_fd = (int)syscall(PYE_NR_PIDFD_GETFD, pidfd, target, 0);
    return pye_os_result(*out_fd);
}

pye_status pye_process_read(int64_t pid, uint64_t address, uint8_t *out, size_t len,
                            size_t *out_len)
{
    struct iovec local = {.iov_base = out, .iov_len = len};
    struct iovec remote = {.iov_base = NULL, .iov_len = len};
    ssize_t got;

    *out_len = 0;
    PYE_REFUSE_IF(pid <= 0 || pid > INT_MAX || len == 0 || address > UINTPTR_MAX, PYE_E_ARGUMENT);
    remote.iov_base = (void *)(uintptr_t)address; /* never dereferenced here */
    got = syscall(SYS_process_vm_readv, (int)pid, &local, 1, &remote, 1, 0);
    PYE_REFUSE_IF(got < 0, pye_os_status(errno));
    *out_len = (size_t)got;
    return PYE_OK;
}

#endif
