/* pager_map.c - the two mappings of a heap, and how pages are shown in its view and hidden. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "linux/pager_uffd.h"
#include "pyenclave/linux.h"

#include <string.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define BYTES(pages) ((size_t)(pages) * PYE_PAGE_SIZE)

/* map_twice makes the memory file and maps it. The file has no name and its descriptor, by which
 * somebody could map it too, is closed at once. */
static pye_status map_twice(pye_heap *heap, int protection)
{
    pye_status rc;
    const size_t size = BYTES(heap->num_pages);
    const int fd = (int)syscall(PYE_NR_MEMFD_CREATE, "pyenclave-heap", 3 /* CLOEXEC, SEALING */);

    PYE_REFUSE_IF(fd < 0, pye_os_status(errno));
    rc = pye_os_result(ftruncate(fd, (off_t)size));
    if (rc == PYE_OK) {
        rc = pye_os_result(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
    }
    if (rc == PYE_OK) {
        void *const alias =
            mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        void *const view = mmap(NULL, size, protection, MAP_SHARED | MAP_NORESERVE, fd, 0);

        rc = alias == MAP_FAILED || view == MAP_FAILED ? pye_os_status(errno) : PYE_OK;
        heap->alias = alias == MAP_FAILED ? NULL : alias;
        heap->view = view == MAP_FAILED ? NULL : view;
    }
    (void)close(fd);
    return rc;
}

/* keep_apart leaves a mapping out of children and core dumps. Its pages stay small: a huge one
 * would be shown and hidden as a whole. */
static pye_status keep_apart(uint8_t *memory, size_t size)
{
    PYE_REFUSE_IF(madvise(memory, size, MADV_DONTFORK) != 0, pye_os_status(errno));
    PYE_REFUSE_IF(madvise(memory, size, MADV_DONTDUMP) != 0, pye_os_status(errno));
    (void)madvise(memory, size, MADV_NOHUGEPAGE); /* EINVAL where there are none */
    return PYE_OK;
}

/* protects tells whether the kernel shows pages that cannot be written (Linux 6.4): it looks at the
 * mode before it looks for the frame, which is not there yet. */
static int protects(const pye_heap *heap)
{
    uffd_pages pages = {.range = {(uint64_t)(uintptr_t)heap->view, PYE_PAGE_SIZE},
                        .mode = PYE_UFFD_CONTINUE_WP};

    return ioctl(heap->uffd, PYE_UFFDIO_CONTINUE, &pages) != 0 && errno != EINVAL;
}

/* watch_view asks the kernel to tell of accesses to absent pages by SIGBUS, in the thread; and of
 * writes to pages that were shown for reading, if `writes`. */
static pye_status watch_view(pye_heap *heap, int writes)
{
    uffd_api api = {.api = PYE_UFFD_API,
                    .features = PYE_UFFD_SIGBUS | PYE_UFFD_MISSING_SHMEM | PYE_UFFD_MINOR_SHMEM};
    uffd_register watch = {.range = {(uint64_t)(uintptr_t)heap->view, BYTES(heap->num_pages)},
                           .mode = PYE_UFFD_MODE_MISSING | PYE_UFFD_MODE_MINOR};
    const uint64_t needed = PYE_UFFD_CAN_ZEROPAGE | PYE_UFFD_CAN_CONTINUE;

    if (writes) {
        api.features |= PYE_UFFD_WP | PYE_UFFD_WP_SHMEM;
        watch.mode |= PYE_UFFD_MODE_WP;
    }
    /* The kernel's own accesses are not served (that would take a privilege): they are EFAULT. */
    heap->uffd = (int32_t)syscall(PYE_NR_USERFAULTFD, O_CLOEXEC | PYE_UFFD_USER_MODE_ONLY);
    PYE_REFUSE_IF(heap->uffd < 0, pye_os_status(errno));
    /* EINVAL: this kernel lacks one of the features. Who fails leaves nothing for the next. */
    PYE_REFUSE_IF(ioctl(heap->uffd, PYE_UFFDIO_API, &api) != 0 ||
                      ioctl(heap->uffd, PYE_UFFDIO_REGISTER, &watch) != 0 ||
                      (watch.ioctls & needed) != needed,
                  PYE_E_UNSUPPORTED);
    return PYE_OK;
}

/* may_swap tells whether the system has somewhere to swap to, or does not say. */
static int may_swap(void)
{
    struct sysinfo info;

    return syscall(SYS_sysinfo, &info) != 0 || info.totalswap != 0;
}

/* lock_pages keeps what is shown out of swap: by one lock if the limit of locked memory has room
 * for the capacity; else, if that is asked for, each page while it is shown.
 *
 * A lock of the view costs the kernel an entry of its lists for each page that is shown, and again
 * for each that is hidden. One of the alias costs it once a frame, but keeps ciphertext in memory too:
 * where there is no swap, nothing is lost by that. MADV_REMOVE, which is not for locked mappings, then
 * goes by the view, that must be writable for it (by mprotect it is not always). */
static pye_status lock_pages(pye_heap *heap)
{
    const size_t size = BYTES(heap->num_pages);
    uint64_t soft;
    uint64_t hard;

    heap->locks_alias = heap->mechanism == PYE_HEAP_USERFAULTFD && !may_swap();
    uint8_t *const memory = heap->locks_alias ? heap->alias : heap->view;
    /* The system call, not mlock2(): older C libraries do not have it. Pages are locked as they are
     * mapped (MLOCK_ONFAULT). */
    if (syscall(PYE_NR_MLOCK2, memory, size, 1) == 0) {
        if (madvise(heap->view, PYE_PAGE_SIZE, MADV_DONTNEED_LOCKED) == 0) {
            heap->locks = PYE_HEAP_LOCK_ALL;
            return PYE_OK;
        }
        (void)munlock(memory, size); /* before Linux 5.18 the view could not be hidden any more */
    }
    heap->locks_alias = 0;
    heap->locks = PYE_HEAP_LOCK_NONE;
    if (!heap->require_locked) {
        return PYE_OK;
    }
    PYE_TRY(pye_secmem_limit(&soft, &hard));
    PYE_REFUSE_IF(BYTES(heap->queue.num_slots) > soft, PYE_E_DENIED);
    heap->locks = PYE_HEAP_LOCK_SHOWN;
    return PYE_OK;
}

static void close_fd(int32_t *fd)
{
    if (*fd >= 0) {
        (void)close(*fd);
    }
    *fd = -1;
}

static pye_status map_as(pye_heap *heap, uint32_t mechanism)
{
    const size_t size = BYTES(heap->num_pages);

    heap->mechanism = mechanism;
    PYE_TRY(map_twice(heap, mechanism == PYE_HEAP_MPROTECT ? PROT_NONE : PROT_READ | PROT_WRITE));
    PYE_TRY(keep_apart(heap->alias, size));
    PYE_TRY(keep_apart(heap->view, size));
    PYE_TRY(lock_pages(heap));
    if (mechanism == PYE_HEAP_MPROTECT) {
        heap->tracks = heap->fd >= 0;
        return PYE_OK;
    }
    heap->tracks = 0;
    if (heap->fd >= 0) {
        heap->tracks = watch_view(heap, 1) == PYE_OK && protects(heap);
        if (!heap->tracks) {
            close_fd(&heap->uffd); /* one is for one set of features */
        }
    }
    if (!heap->tracks) {
        PYE_TRY(watch_view(heap, 0));
    }
    /* Many scattered pages are hidden by one call, of kernels that take it for oneself (6.13). */
    heap->pidfd = (int32_t)syscall(PYE_NR_PIDFD_OPEN, (long)getpid(), 0L);
    heap->lists = heap->pidfd >= 0;
    return PYE_OK;
}

pye_status pager_map(pye_heap *heap, uint32_t mechanism)
{
    pye_status rc;

    if (mechanism != PYE_HEAP_AUTO) {
        return map_as(heap, mechanism);
    }
    rc = map_as(heap, PYE_HEAP_USERFAULTFD);
    if (rc == PYE_OK || rc == PYE_E_NO_MEMORY) {
        return rc;
    }
    pager_unmap(heap);
    return map_as(heap, PYE_HEAP_MPROTECT);
}

void pager_drop_frames(pye_heap *heap)
{
    if (heap->alias != NULL) {
        (void)munmap(heap->alias, BYTES(heap->num_pages));
        heap->alias = NULL;
    }
}

void pager_unmap(pye_heap *heap)
{
    /* The view first: without its descriptor it would be ordinary memory full of ciphertext. */
    if (heap->view != NULL) {
        (void)munmap(heap->view, BYTES(heap->num_pages));
        heap->view = NULL;
    }
    pager_drop_frames(heap);
    close_fd(&heap->uffd);
    close_fd(&heap->pidfd);
}

/* ---- by userfaultfd ---- */

/* resolve has the kernel map `num` pages. Those that are mapped already are passed over. */
static pye_status resolve(pye_heap *heap, unsigned long request, uint32_t page, uint32_t num,
                          uint64_t mode)
{
    uint64_t at = (uint64_t)(uintptr_t)pager_place(heap, page);
    const uint64_t end = at + BYTES(num);

    while (at < end) {
        uffd_pages pages = {.range = {at, end - at}, .mode = mode};

        if (ioctl(heap->uffd, request, &pages) == 0) {
            return PYE_OK;
        }
        if (pages.done > 0) {
            at += (uint64_t)pages.done;
        } else if (errno == EEXIST) {
            at += PYE_PAGE_SIZE;
        } else {
            PYE_REFUSE_IF(errno != EAGAIN && errno != EINTR, pye_os_status(errno));
        }
    }
    return PYE_OK;
}

/* hide_one_by_one is for kernels that do not take a list. */
static pye_status hide_one_by_one(const struct iovec *runs, uint32_t num_runs, int advice)
{
    for (uint32_t i = 0; i < num_runs; i++) {
        if (madvise(runs[i].iov_base, runs[i].iov_len, advice) != 0) {
            /* Locked by the process meanwhile (mlockall). */
            PYE_REFUSE_IF(errno != EINVAL || madvise(runs[i].iov_base, runs[i].iov_len,
                                                     MADV_DONTNEED_LOCKED) != 0,
                          pye_os_status(errno));
        }
    }
    return PYE_OK;
}

static pye_status hide_absent(pye_heap *heap, uint32_t num_runs, size_t len)
{
    const int advice =
        heap->locks == PYE_HEAP_LOCK_NONE ? MADV_DONTNEED : MADV_DONTNEED_LOCKED;

    if (num_runs > 1 && heap->lists) {
        if (syscall(PYE_NR_PROCESS_MADVISE, heap->pidfd, heap->runs, (size_t)num_runs, advice,
                    0) == (long)len) {
            return PYE_OK;
        }
        heap->lists = 0; /* not here; what it did may be done again */
    }
    return hide_one_by_one(heap->runs, num_runs, advice);
}

/* ---- by mprotect ---- */

/* protect_all hides everything, which always works because it leaves a single mapping; what is
 * resident then comes back at the next touch without being opened. Pinned pages come back now. */
static pye_status protect_all(pye_heap *heap)
{
    PYE_REFUSE_IF(mprotect(heap->view, BYTES(heap->num_pages), PROT_NONE) != 0,
                  pye_os_status(errno));
    for (uint32_t i = 0; heap->queue.pinned != 0 && i < heap->queue.fresh; i++) {
        const uint32_t page = heap->queue.slots[i].page;

        if (heap->queue.slot_of[page] == i + 1 && heap->queue.slots[i].pins != 0) {
            PYE_REFUSE_IF(mprotect(pager_place(heap, page), PYE_PAGE_SIZE,
                                   PROT_READ | PROT_WRITE) != 0,
                          pye_os_status(errno));
        }
    }
    return PYE_OK;
}

/* protect changes a run. When the process has no mapping left to split (ENOMEM), all are joined. */
static pye_status protect(pye_heap *heap, void *memory, size_t len, int protection)
{
    if (mprotect(memory, len, protection) == 0) {
        return PYE_OK;
    }
    PYE_REFUSE_IF(errno != ENOMEM, pye_os_status(errno));
    PYE_TRY(protect_all(heap));
    return protection == PROT_NONE ? PYE_OK : pye_os_result(mprotect(memory, len, protection));
}

/* ---- both ---- */

pye_status pager_show(pye_heap *heap, uint32_t page, uint32_t num, int clean)
{
    uint8_t *const place = pager_place(heap, page);
    const int locked = heap->locks == PYE_HEAP_LOCK_SHOWN;

    if (heap->mechanism == PYE_HEAP_MPROTECT) {
        PYE_TRY(protect(heap, place, BYTES(num), clean ? PROT_READ : PROT_READ | PROT_WRITE));
    } else {
        PYE_TRY(resolve(heap, PYE_UFFDIO_CONTINUE, page, num, clean ? PYE_UFFD_CONTINUE_WP : 0));
    }
    PYE_REFUSE_IF(locked && syscall(PYE_NR_MLOCK2, place, BYTES(num), 1) != 0,
                  pye_os_status(errno));
    return PYE_OK;
}

pye_status pager_show_zero(pye_heap *heap, uint32_t page, uint32_t num, int clean)
{
    /* The frames are made in the alias, whose page tables they need too when they are sealed. A
     * plain access would do, but would end the process where memory is short. */
    PYE_TRY(pager_populate(heap, page, num));
    return pager_show(heap, page, num, clean);
}

pye_status pager_populate(pye_heap *heap, uint32_t page, uint32_t num)
{
    if (madvise(pager_frame(heap, page), BYTES(num), MADV_POPULATE_WRITE) == 0) {
        return PYE_OK;
    }
    PYE_REFUSE_IF(errno != EINVAL, pye_os_status(errno));
    for (uint32_t i = 0; i < num; i++) { /* before Linux 5.14 */
        *(volatile uint8_t *)pager_frame(heap, page + i) = 0;
    }
    return PYE_OK;
}

pye_status pager_unprotect(pye_heap *heap, uint32_t page, uint32_t num)
{
    uffd_protect change = {.range = {(uint64_t)(uintptr_t)pager_place(heap, page), BYTES(num)}};

    if (heap->mechanism == PYE_HEAP_MPROTECT) {
        return protect(heap, pager_place(heap, page), BYTES(num), PROT_READ | PROT_WRITE);
    }
    while (ioctl(heap->uffd, PYE_UFFDIO_WRITEPROTECT, &change) != 0) {
        PYE_REFUSE_IF(errno != EAGAIN && errno != EINTR, pye_os_status(errno));
    }
    return PYE_OK;
}

/* find_runs joins neighbours, whether they come in rising or in falling order. */
static uint32_t find_runs(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    struct iovec *const runs = heap->runs;
    uint32_t num_runs = 0;

    for (uint32_t i = 0; i < num; i++) {
        uint8_t *const place = pager_place(heap, pages[i]);

        if (num_runs != 0) {
            struct iovec *last = &runs[num_runs - 1];

            if (place == (uint8_t *)last->iov_base + last->iov_len) {
                last->iov_len += PYE_PAGE_SIZE;
                continue;
            }
            if (place + PYE_PAGE_SIZE == last->iov_base) {
                last->iov_base = place;
                last->iov_len += PYE_PAGE_SIZE;
                continue;
            }
        }
        runs[num_runs++] = (struct iovec){place, PYE_PAGE_SIZE};
    }
    return num_runs;
}

pye_status pager_hide(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    const uint32_t num_runs = find_runs(heap, pages, num);

    if (heap->mechanism == PYE_HEAP_USERFAULTFD) {
        PYE_TRY(hide_absent(heap, num_runs, BYTES(num)));
    }
    for (uint32_t i = 0; i < num_runs; i++) {
        void *const run = heap->runs[i].iov_base;

        if (heap->mechanism == PYE_HEAP_MPROTECT) {
            PYE_TRY(protect(heap, run, heap->runs[i].iov_len, PROT_NONE));
            /* Ciphertext may well be swapped; what was locked is until it is unmapped. */
            (void)madvise(run, heap->runs[i].iov_len, MADV_DONTNEED_LOCKED);
        }
        if (heap->locks == PYE_HEAP_LOCK_SHOWN) {
            PYE_REFUSE_IF(munlock(run, heap->runs[i].iov_len) != 0, pye_os_status(errno));
        }
    }
    return PYE_OK;
}

pye_status pager_punch(pye_heap *heap, uint32_t page, uint32_t num)
{
    if (heap->mechanism == PYE_HEAP_MPROTECT) {
        PYE_TRY(protect(heap, pager_place(heap, page), BYTES(num), PROT_NONE));
    }
    return pager_remove(heap, page, num);
}

pye_status pager_remove(pye_heap *heap, uint32_t page, uint32_t num)
{
    uint8_t *const unlocked = heap->locks_alias ? heap->view : heap->alias;
    uint8_t *const place = unlocked + BYTES(page);

    /* The kernel takes the frames out of every mapping first. */
    if (madvise(place, BYTES(num), MADV_REMOVE) == 0) {
        return PYE_OK;
    }
    PYE_REFUSE_IF(errno != EINVAL, pye_os_status(errno));
    /* The process has locked all its memory (mlockall); all of the mapping stays one. */
    PYE_REFUSE_IF(munlock(unlocked, BYTES(heap->num_pages)) != 0, pye_os_status(errno));
    return pye_os_result(madvise(place, BYTES(num), MADV_REMOVE));
}

/* ---- of a heap that has ended ---- */

pye_status pager_reserve(pye_heap *heap)
{
    const size_t size = BYTES(heap->num_pages);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;

    /* One step: there is no moment at which the range is free for somebody else's mapping. */
    PYE_REFUSE_IF(mmap(heap->view, size, PROT_NONE, flags, -1, 0) == MAP_FAILED,
                  pye_os_status(errno));
    (void)madvise(heap->view, size, MADV_DONTFORK);
    (void)madvise(heap->view, size, MADV_DONTDUMP);
    return PYE_OK;
}

pye_status pager_zero_page(pye_heap *heap, uint32_t page)
{
    return pye_os_result(mprotect(pager_place(heap, page), PYE_PAGE_SIZE, PROT_READ | PROT_WRITE));
}

void pager_zero_gone(pye_heap *heap, uint32_t page)
{
    /* First its content, which may be something that was written there. */
    (void)madvise(pager_place(heap, page), PYE_PAGE_SIZE, MADV_DONTNEED);
    (void)mprotect(pager_place(heap, page), PYE_PAGE_SIZE, PROT_NONE);
}

#else
typedef int pye_pager_map_is_for_linux; /* ISO C wants a declaration */
#endif
