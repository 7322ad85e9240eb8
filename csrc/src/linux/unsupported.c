/* unsupported.c - the answer of every other system: what only Linux has is not there. */
#include "pyenclave/heap.h"
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

pye_status pye_heap_new(pye_heap **out, const pye_heap_options *options)
{
    (void)out;
    (void)options;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_close(pye_heap *heap)
{
    (void)heap;
    return PYE_E_UNSUPPORTED;
}

void pye_heap_conceal(pye_heap *heap)
{
    (void)heap;
}

pye_status pye_heap_zeros(pye_heap *heap, uintptr_t address, uintptr_t owner)
{
    (void)heap;
    (void)address;
    (void)owner;
    return PYE_E_UNSUPPORTED;
}

void pye_heap_stepped(pye_heap *heap, uintptr_t owner, int stay)
{
    (void)heap;
    (void)owner;
    (void)stay;
}

void pye_heap_free(pye_heap *heap)
{
    (void)heap;
}

int pye_heap_live(const pye_heap *heap)
{
    (void)heap;
    return 0;
}

void pye_heap_child(const int32_t fds[PYE_HEAP_FDS])
{
    (void)fds;
}

void pye_heap_descriptors(const pye_heap *heap, int32_t fds[PYE_HEAP_FDS])
{
    (void)heap;
    (void)fds;
}

void *pye_heap_base(const pye_heap *heap)
{
    (void)heap;
    return NULL;
}

uint32_t pye_heap_mechanism(const pye_heap *heap)
{
    (void)heap;
    return 0;
}

pye_status pye_heap_fault(pye_heap *heap, uintptr_t address, uint32_t flags)
{
    (void)heap;
    (void)address;
    (void)flags;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_prefetch(pye_heap *heap, uint64_t *out_shown, uint64_t first, uint64_t num)
{
    (void)heap;
    (void)out_shown;
    (void)first;
    (void)num;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_evict(pye_heap *heap, uint64_t *out_evicted, uint64_t first, uint64_t num)
{
    (void)heap;
    (void)out_evicted;
    (void)first;
    (void)num;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_pin(pye_heap *heap, uint64_t first, uint64_t num)
{
    (void)heap;
    (void)first;
    (void)num;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_unpin(pye_heap *heap, uint64_t first, uint64_t num)
{
    (void)heap;
    (void)first;
    (void)num;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_discard(pye_heap *heap, uint64_t first, uint64_t num)
{
    (void)heap;
    (void)first;
    (void)num;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_hire(pye_heap *heap)
{
    (void)heap;
    return PYE_E_UNSUPPORTED;
}

void pye_heap_help(pye_heap *heap)
{
    (void)heap;
}

void pye_heap_dismiss(pye_heap *heap)
{
    (void)heap;
}

uint32_t pye_heap_locks(const pye_heap *heap)
{
    (void)heap;
    return PYE_HEAP_LOCK_NONE;
}

pye_status pye_heap_poisoned(const pye_heap *heap, uint64_t *out_page, int32_t *out_errno)
{
    (void)heap;
    *out_page = 0;
    *out_errno = 0;
    return PYE_OK;
}

pye_status pye_heap_stats_read(pye_heap *heap, pye_heap_stats *out)
{
    (void)heap;
    (void)out;
    return PYE_E_UNSUPPORTED;
}

uint8_t *pye_heap_frame(const pye_heap *heap, uint64_t page)
{
    (void)heap;
    (void)page;
    return NULL;
}

pye_status pye_heap_meta(pye_heap *heap, uint64_t *out_version, uint8_t out_tag[16], uint64_t page)
{
    (void)heap;
    (void)out_version;
    (void)out_tag;
    (void)page;
    return PYE_E_UNSUPPORTED;
}

pye_status pye_heap_set_meta(pye_heap *heap, uint64_t page, uint64_t version, const uint8_t tag[16])
{
    (void)heap;
    (void)page;
    (void)version;
    (void)tag;
    return PYE_E_UNSUPPORTED;
}

uint8_t *pye_heap_nodes(const pye_heap *heap, size_t *out_size)
{
    (void)heap;
    *out_size = 0;
    return NULL;
}

pye_status pye_heap_skip(pye_heap *heap, uint64_t next_version)
{
    (void)heap;
    (void)next_version;
    return PYE_E_UNSUPPORTED;
}

#else

/* ISO C wants a declaration in every file. */
typedef int pye_linux_has_it_all;

#endif
