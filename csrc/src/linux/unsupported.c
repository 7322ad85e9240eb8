/* unsupported.c - the answer of every other system: what only Linux has is not there. */
#include "pyenclave/linux.h"

#if !defined(__linux__)

pye_status pye_fd_check_memfd(int fd, uint64_t size, uint32_t seals, uint64_t *out_size)
{
    (void)fd;
    (void)size;
    (void)seals;
    (void)out_size;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_fds_close_except(const int *keep, size_t num_keep)
{
    (void)keep;
    (void)num_keep;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_pidfd_open(int *out_fd, int64_t pid)
{
    (void)out_fd;
    (void)pid;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_pidfd_wait(int pidfd, uint32_t timeout_ms)
{
    (void)pidfd;
    (void)timeout_ms;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_pidfd_kill(int pidfd, int signal)
{
    (void)pidfd;
    (void)signal;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_pidfd_steal(int *out_fd, int pidfd, int target)
{
    (void)out_fd;
    (void)pidfd;
    (void)target;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_process_read(int64_t pid, uint64_t address, uint8_t *out, size_t len,
                            size_t *out_len)
{
    (void)pid;
    (void)address;
    (void)out;
    (void)len;
    (void)out_len;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_dumpable_off(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_core_limit(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_no_new_privs(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_parent_death(int signal, int parent_pidfd)
{
    (void)signal;
    (void)parent_pidfd;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_mdwe(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_signals(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_capabilities(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_limit(int resource, uint64_t value)
{
    (void)resource;
    (void)value;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_tracer(int64_t *out_pid)
{
    (void)out_pid;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_harden_threads(uint32_t *out_count)
{
    (void)out_count;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_landlock(uint32_t *out_abi)
{
    (void)out_abi;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_seccomp(uint32_t flags)
{
    (void)flags;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_seccomp_loading(void)
{
    return PYE_E_UNSUPPORTED;
}

pye_status pye_seccomp_deny(const int *calls, size_t num_calls, int error_number)
{
    (void)calls;
    (void)num_calls;
    (void)error_number;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_spawn_worker(pye_spawned *out, uint32_t namespaces, uint32_t flags)
{
    (void)out;
    (void)namespaces;
    (void)flags;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_before(pye_sandbox *sandbox)
{
    (void)sandbox;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_after(pye_sandbox *sandbox, uint32_t flags)
{
    (void)sandbox;
    (void)flags;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_sandbox_probe(pye_sandbox *sandbox, uint32_t *out_bits)
{
    (void)sandbox;
    (void)out_bits;
    return PYE_E_UNSUPPORTED;
}

#else

/* ISO C wants a declaration in every file. */
typedef int pye_linux_has_it_all;

#endif
