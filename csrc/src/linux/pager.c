/* pager.c - the life of a heap: made, closed, freed; and what tests look at. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "linux/pager_lock.h"
#include "pyenclave/linux.h"

#include <string.h>
#include <unistd.h>

#define LIVE UINT64_C(0x7079652d68656170) /* "pye-heap" */
#define SMALLEST_BATCH 4

_Static_assert(PYE_HEAP_PAGE_SIZE == PYE_PAGE_SIZE, "a page of a heap is sealed whole");
_Static_assert(PYE_HEAP_MAX_PAGES < HEAP_NO_PAGE, "no page has that number");

int pye_heap_live(const pye_heap *heap)
{
    return *(const volatile uint64_t *)&heap->live == LIVE;
}

static pye_status check_options(const pye_heap_options *options)
{
    PYE_REFUSE_IF(options->capacity_pages == 0 || options->capacity_pages > PYE_HEAP_MAX_PAGES,
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF(options->resident_pages < PYE_HEAP_MIN_RESIDENT ||
                      options->resident_pages > PYE_HEAP_MAX_PAGES,
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF(options->mechanism > PYE_HEAP_MPROTECT, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(options->read_ahead > PYE_HEAP_MAX_WINDOW, PYE_E_ARGUMENT);
    /* On AArch64 it may be 16 or 64 KiB. */
    PYE_REFUSE_IF(sysconf(_SC_PAGESIZE) != PYE_PAGE_SIZE, PYE_E_UNSUPPORTED);
    return PYE_OK;
}

/* part returns `size` bytes of the mapping behind `*used`. */
static void *part(uint8_t *base, size_t *used, size_t size)
{
    void *const found = base + *used;

    *used += (size + 63) / 64 * 64;
    return found;
}

/* make_own_memory lays out everything but the pages and the key. */
static pye_status make_own_memory(pye_heap **out, const pye_heap_options *options)
{
    const size_t pages = (size_t)options->capacity_pages;
    /* More slots than pages would never be used. */
    const size_t most = pages < PYE_HEAP_MIN_RESIDENT ? PYE_HEAP_MIN_RESIDENT : pages;
    const size_t slots = options->resident_pages < most ? (size_t)options->resident_pages : most;
    /* With a tree there are no arrays of versions and tags. */
    const size_t listed = options->capacity_pages > options->tree_above ? 0 : pages;
    const size_t size = sizeof(pye_heap) + slots * sizeof(heap_slot) + pages * sizeof(uint32_t) +
                        listed * (sizeof(uint64_t) + PYE_PAGE_TAG_SIZE) + 5 * 64;
    size_t used = 0;
    uint8_t *const base = mmap(NULL, size, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    PYE_REFUSE_IF(base == MAP_FAILED, pye_os_status(errno));
    if (PYE_GUARD(madvise(base, size, MADV_WIPEONFORK) != 0 ||
                  madvise(base, size, MADV_DONTDUMP) != 0)) {
        (void)munmap(base, size);
        return PYE_E_UNSUPPORTED;
    }
    pye_heap *const heap = part(base, &used, sizeof(pye_heap));
    heap_slot *const all_slots = part(base, &used, slots * sizeof(heap_slot));
    uint32_t *const slot_of = part(base, &used, pages * sizeof(uint32_t));
    uint64_t *const versions = part(base, &used, listed * sizeof(uint64_t));
    heap_meta_arrays(&heap->meta, versions, part(base, &used, listed * PYE_PAGE_TAG_SIZE),
                     (uint32_t)pages);
    heap_queue_init(&heap->queue, all_slots, (uint32_t)slots, slot_of);
    heap_window_init(&heap->window,
                     options->read_ahead == 0 ? PYE_HEAP_MAX_WINDOW : options->read_ahead);
    heap_window_init(&heap->writes, heap->window.largest);
    heap->size = size;
    heap->num_pages = (uint32_t)pages;
    heap->uffd = heap->pidfd = heap->fd = -1;
    heap->require_locked = options->require_locked;
    heap->batch = (uint32_t)(slots / 16 < SMALLEST_BATCH ? SMALLEST_BATCH
                             : slots / 16 > PAGER_BATCH  ? PAGER_BATCH
                                                         : slots / 16);
    *out = heap;
    return PYE_OK;
}

pye_status pager_new_key(pye_epoch_key **key)
{
    struct {
        uint8_t secret[PYE_EPOCH_SECRET_SIZE];
        uint8_t name[PYE_PAGE_ENCLAVE_SIZE];
    } fresh;
    pye_status rc;
    uint32_t kind;
    void *memory;

    /* 48 bytes come whole (getrandom(2)); a child that was vforked has the same memory anyway. */
    PYE_REQUIRE(syscall(PYE_NR_GETRANDOM, &fresh, sizeof(fresh), 0) == (long)sizeof(fresh),
                PYE_E_RANDOM);
    PYE_CHECK(pye_secmem_new(&memory, pye_epoch_key_size(), &kind));
    *key = memory;
    PYE_CHECK(pye_epoch_key_init(*key, fresh.secret, fresh.name, UINT32_MAX));
done:
    pye_wipe(&fresh, sizeof(fresh));
    return rc;
}

void pager_free_key(pye_epoch_key *key)
{
    if (key != NULL) {
        pye_epoch_key_destroy(key);
        pye_secmem_free(key, pye_epoch_key_size());
    }
}

static void free_own_memory(pye_heap *heap)
{
    if (heap->fd >= 0) {
        (void)close(heap->fd);
    }
    pager_free_key(heap->key);
    pager_tree_free(heap);
    (void)munmap(heap, heap->size);
}

pye_status pye_heap_new(pye_heap **out, const pye_heap_options *options)
{
    pye_status rc;
    pye_heap *heap = NULL;

    *out = NULL;
    PYE_CHECK(check_options(options));
    PYE_CHECK(make_own_memory(&heap, options));
    PYE_CHECK(pager_new_key(&heap->key));
    if (options->capacity_pages > options->tree_above) {
        PYE_CHECK(pager_tree_new(heap, options->tree_cache, options->fd >= 0));
    }
    if (options->fd >= 0) {
        heap->fd = fcntl(options->fd, F_DUPFD_CLOEXEC, 0);
        PYE_REQUIRE(heap->fd >= 0, pye_os_status(errno));
    }
    PYE_CHECK(pager_map(heap, options->mechanism));
    heap->live = LIVE;
    *out = heap;
    return PYE_OK;
done:
    if (heap != NULL) {
        const int saved = errno;

        pager_unmap(heap);
        free_own_memory(heap);
        errno = saved;
    }
    return rc;
}

pye_status pye_heap_close(pye_heap *heap)
{
    sigset_t before;

    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    pager_block(&before);
    pager_lock(&heap->lock);
    if (heap->ended == PYE_OK) {
        pager_end(heap, PYE_E_CLOSED);
    }
    pager_unlock(&heap->lock);
    pager_unblock(&before);
    return PYE_OK;
}

void pye_heap_free(pye_heap *heap)
{
    if (heap == NULL || pye_heap_close(heap) != PYE_OK) {
        return; /* in a child: its pages and its key are not there, its own memory is zeros */
    }
    pager_unmap(heap);
    free_own_memory(heap);
}

void pye_heap_descriptors(const pye_heap *heap, int32_t fds[PYE_HEAP_FDS])
{
    fds[0] = heap->uffd;
    fds[1] = heap->pidfd;
    fds[2] = heap->fd;
}

void pye_heap_child(const int32_t fds[PYE_HEAP_FDS])
{
    for (int i = 0; i < PYE_HEAP_FDS; i++) {
        if (fds[i] >= 0) {
            (void)close(fds[i]);
        }
    }
}

void *pye_heap_base(const pye_heap *heap)
{
    return heap->view;
}

uint32_t pye_heap_mechanism(const pye_heap *heap)
{
    return heap->mechanism;
}

uint32_t pye_heap_locks(const pye_heap *heap)
{
    return heap->locks;
}

pye_status pye_heap_poisoned(const pye_heap *heap, uint64_t *out_page, int32_t *out_errno)
{
    const int poisoned =
        atomic_load_explicit(&heap->ended, memory_order_acquire) == PYE_E_POISONED;

    *out_page = poisoned ? heap->poison_page : 0;
    *out_errno = poisoned ? heap->poison_errno : 0;
    return poisoned ? heap->poison : PYE_OK;
}

uint8_t *pye_heap_frame(const pye_heap *heap, uint64_t page)
{
    if (!pye_heap_live(heap) || heap->alias == NULL || page >= heap->num_pages) {
        return NULL;
    }
    return pager_frame(heap, (uint32_t)page);
}

pye_status pye_heap_meta(pye_heap *heap, uint64_t *out_version, uint8_t out_tag[16],
                         uint64_t page)
{
    *out_version = 0;
    memset(out_tag, 0, PYE_PAGE_TAG_SIZE);
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    PYE_REFUSE_IF(page >= heap->num_pages, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(heap->ended != PYE_OK, (pye_status)heap->ended);
    sigset_t before;
    pager_block(&before);
    pager_lock(&heap->lock);
    const pye_status rc = heap_meta_look(&heap->meta, (uint32_t)page, 1);
    if (rc == PYE_OK) {
        *out_version = heap_meta_version(&heap->meta, (uint32_t)page);
        memcpy(out_tag, heap_meta_tag(&heap->meta, (uint32_t)page), PYE_PAGE_TAG_SIZE);
    }
    pager_unlock(&heap->lock);
    pager_unblock(&before);
    return rc;
}

pye_status pye_heap_set_meta(pye_heap *heap, uint64_t page, uint64_t version,
                             const uint8_t tag[16])
{
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    PYE_REFUSE_IF(page >= heap->num_pages, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(heap->ended != PYE_OK, (pye_status)heap->ended);
    sigset_t before;
    pager_block(&before);
    pager_lock(&heap->lock);
    const pye_status rc = heap_meta_set(&heap->meta, (uint32_t)page, version, tag);
    pager_unlock(&heap->lock);
    pager_unblock(&before);
    return rc;
}

pye_status pye_heap_skip(pye_heap *heap, uint64_t next_version)
{
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    return pye_epoch_skip(heap->key, next_version);
}

uint8_t *pye_heap_nodes(const pye_heap *heap, size_t *out_size)
{
    *out_size = heap->nodes_size;
    return heap->nodes;
}

#else
typedef int pye_pager_is_for_linux; /* ISO C wants a declaration */
#endif
