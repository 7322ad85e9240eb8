/* secmem.c - memory for keys and plaintext.
 *
 * Layout, in pages:   head | guard | data ... | guard
 * The head is ordinary memory that a fork wipes (MADV_WIPEONFORK). Its mark therefore tells the
 * creator from a forked child without a system call, and tells `free` whether the data is there:
 * in a child the pages are absent (MADV_DONTFORK) and another mapping may be in their place. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"
#include "pyenclave/linux.h"

#define MARK 0x7079652d7365636dULL /* "pye-secm" */

typedef struct {
    volatile uint64_t mark;
    int64_t pid; /* 0: the mark is wiped by fork; else the creator, where WIPEONFORK is absent */
    size_t size; /* of the data, whole pages */
} head_t;

#if defined(__linux__)

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static size_t page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static head_t *head_of(const void *memory)
{
    return (head_t *)((uintptr_t)memory - 2 * page_size());
}

/* Puts secret pages over the reservation at `data`. The open descriptor could be stolen
 * (pidfd_getfd) and mapped, so it is closed at once. */
static pye_status map_secret(uint8_t *data, size_t size)
{
    pye_status rc;
    void *mapped;
    const int fd = (int)syscall(PYE_NR_MEMFD_SECRET, O_CLOEXEC);

    PYE_REFUSE_IF(fd < 0, pye_os_status(errno));
    rc = pye_os_result(ftruncate(fd, (off_t)size));
    if (rc == PYE_OK) {
        mapped = mmap(data, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
        rc = mapped == MAP_FAILED ? pye_os_status(errno) : PYE_OK;
    }
    (void)close(fd);
    return rc;
}

/* The next best: anonymous pages, locked if the limit allows, out of core dumps. */
static pye_status map_anonymous(uint8_t *data, size_t size, uint32_t *kind)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;

    /* A failed map_secret may have left a hole where the reservation was: nothing else may take
     * it meanwhile, but MAP_FIXED puts our pages there either way. */
    PYE_REFUSE_IF(mmap(data, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED,
                  pye_os_status(errno));
    PYE_REFUSE_IF(madvise(data, size, MADV_DONTDUMP) != 0, pye_os_status(errno));
    /* Not mlock(): AddressSanitizer replaces that by a success that locks nothing. */
    *kind = syscall(SYS_mlock, data, size) == 0 ? PYE_SECMEM_LOCKED : PYE_SECMEM_UNLOCKED;
    return PYE_OK;
}

pye_status pye_secmem_new(void **out, size_t size, uint32_t *kind)
{
    const size_t page = page_size();
    const size_t data_size = (size + page - 1) / page * page;
    const size_t whole = data_size + 3 * page;
    pye_status rc;
    uint8_t *base;
    uint8_t *data;
    head_t *head;

    *out = NULL;
    *kind = 0;
    PYE_REFUSE_IF(size == 0 || size > (size_t)1 << 46, PYE_E_LENGTH);
    base = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    PYE_REFUSE_IF(base == MAP_FAILED, pye_os_status(errno));
    data = base + 2 * page;
    if (PYE_GUARD(mprotect(base, page, PROT_READ | PROT_WRITE) != 0)) {
        rc = pye_os_status(errno);
        goto fail;
    }
    *kind = PYE_SECMEM_SECRET;
    if (map_secret(data, data_size) != PYE_OK) {
        rc = map_anonymous(data, data_size, kind);
        if (PYE_GUARD(rc != PYE_OK)) {
            goto fail;
        }
    }
    if (PYE_GUARD(madvise(data, data_size, MADV_DONTFORK) != 0)) {
        rc = pye_os_status(errno);
        goto fail;
    }
    head = (head_t *)(void *)base;
    head->pid = madvise(base, page, MADV_WIPEONFORK) == 0 ? 0 : (int64_t)getpid();
    head->size = data_size;
    head->mark = MARK;
    *out = data;
    return PYE_OK;
fail:
    *kind = 0;
    (void)munmap(base, whole);
    return rc;
}

int pye_secmem_live(const void *memory)
{
    const head_t *head = head_of(memory);
    return head->mark == MARK && (head->pid == 0 || head->pid == (int64_t)getpid());
}

void pye_secmem_free(void *memory, size_t size)
{
    const int saved = errno;
    const size_t page = page_size();
    const size_t data_size = (size + page - 1) / page * page;
    uint8_t *base;

    if (memory == NULL) {
        return;
    }
    base = (uint8_t *)head_of(memory);
    if (pye_secmem_live(memory)) {
        pye_wipe(memory, ((head_t *)(void *)base)->size);
        (void)munmap(base, ((head_t *)(void *)base)->size + 3 * page);
    } else {
        (void)munmap(base, 2 * page);
        (void)munmap((uint8_t *)memory + data_size, page);
    }
    errno = saved;
}

pye_status pye_secmem_limit(uint64_t *out_soft, uint64_t *out_hard)
{
    struct rlimit limit;

    *out_soft = *out_hard = 0;
    PYE_REFUSE_IF(getrlimit(RLIMIT_MEMLOCK, &limit) != 0, pye_os_status(errno));
    *out_soft = limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : (uint64_t)limit.rlim_cur;
    *out_hard = limit.rlim_max == RLIM_INFINITY ? UINT64_MAX : (uint64_t)limit.rlim_max;
    return PYE_OK;
}

#else

#include <stdlib.h>

/* Elsewhere: ordinary memory, and `kind` says that it is. Keys still get wiped. There are no
 * guards and no fork mark; sealing files and measuring need neither. */
#define HEAD 64

pye_status pye_secmem_new(void **out, size_t size, uint32_t *kind)
{
    uint8_t *base;

    *out = NULL;
    *kind = 0;
    PYE_REFUSE_IF(size == 0 || size > (size_t)1 << 40, PYE_E_LENGTH);
    base = calloc(1, (size + 2 * HEAD + 63) / 64 * 64);
    PYE_REFUSE_IF(base == NULL, PYE_E_NO_MEMORY);
    const size_t shift = HEAD + (HEAD - (uintptr_t)base % HEAD) % HEAD;
    *out = base + shift;
    ((head_t *)(void *)(base + shift - HEAD))->mark = MARK;
    ((head_t *)(void *)(base + shift - HEAD))->size = shift;
    *kind = PYE_SECMEM_UNLOCKED;
    return PYE_OK;
}

int pye_secmem_live(const void *memory)
{
    return ((const head_t *)((uintptr_t)memory - HEAD))->mark == MARK;
}

void pye_secmem_free(void *memory, size_t size)
{
    if (memory != NULL) {
        const size_t shift = ((const head_t *)((uintptr_t)memory - HEAD))->size;
        pye_wipe(memory, size);
        free((uint8_t *)memory - shift);
    }
}

pye_status pye_secmem_limit(uint64_t *out_soft, uint64_t *out_hard)
{
    *out_soft = *out_hard = 0;
    return PYE_E_UNSUPPORTED;
}

#endif
