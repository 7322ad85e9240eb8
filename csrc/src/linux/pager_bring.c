/* pager_bring.c - what a fault does: pages opened, shown, and allowed to be written. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "linux/pager_lock.h"

static pye_status open_pages(pye_heap *heap, uint32_t page, uint32_t num)
{
    const pye_page_info info = pager_info(page);
    uint8_t *const frame = pager_frame(heap, page);
    const uint64_t *const versions = &heap->meta.versions[page - heap->meta.base];
    const uint8_t *const tag = heap_meta_tag(&heap->meta, page);

    if (num == 1) {
        pye_page_key *key;

        PYE_TRY(pye_epoch_to_open(heap->key, &key, *versions));
        return pye_page_open(key, frame, frame, tag, *versions, &info);
    }
    return pye_epoch_pages_open(heap->key, frame, frame, tag, versions, num, &info);
}

pye_status pager_look(pye_heap *heap, uint32_t page, uint32_t num)
{
    const uint32_t most = num < heap->num_pages - page ? num : heap->num_pages - page;
    const pye_status rc = heap_meta_look(&heap->meta, page, most);

    return rc == PYE_OK ? PYE_OK : pager_poison(heap, rc, page);
}

/* give_way evicts old pages, but none of those that are being brought, wherever they are in the
 * order: sealed before they were shown they would be shown sealed, and nobody would hide them. */
static pye_status give_way(pye_heap *heap, uint32_t page, uint32_t num)
{
    heap_queue_settle(&heap->queue); /* passing ones, as these may be, would go first */
    const uint32_t oldest = heap_queue_oldest(&heap->queue, heap->victims, PAGER_BATCH);
    uint32_t found = 0;

    for (uint32_t i = 0; i < oldest; i++) {
        if (heap->victims[i] - page >= num) {
            heap->victims[found++] = heap->victims[i];
        }
    }
    return found == 0 ? PYE_E_NO_MEMORY : pager_evict(heap, heap->victims, found, 1);
}

/* show maps what is in the frames. Pages that are locked one by one are mappings of their own, of
 * which a process has a limited number: then fewer pages are resident. */
static pye_status show(pye_heap *heap, uint32_t page, uint32_t num, int cold, int clean)
{
    for (;;) {
        const pye_status rc = cold ? pager_show(heap, page, num, clean)
                                   : pager_show_zero(heap, page, num, clean);

        if (rc != PYE_E_NO_MEMORY || heap->locks != PYE_HEAP_LOCK_SHOWN) {
            return rc;
        }
        PYE_TRY(give_way(heap, page, num));
    }
}

/* one_key returns the key that opens all of the pages, or NULL if there are several. Epochs are
 * compared, since two old ones get their keys at one address, one after the other. */
static pye_page_key *one_key(pye_heap *heap, uint32_t page, uint32_t num)
{
    const uint64_t version = heap_meta_version(&heap->meta, page);
    pye_page_key *key;

    for (uint32_t i = 1; i < num; i++) {
        if ((heap_meta_version(&heap->meta, page + i) ^ version) >> PYE_EPOCH_SHIFT != 0) {
            return NULL;
        }
    }
    return pye_epoch_to_open(heap->key, &key, version) == PYE_OK ? key : NULL;
}

/* open_part opens and shows pages under one key; in any thread. */
static pye_status open_part(pye_heap *heap, const pager_part *part)
{
    const pye_page_info info = pager_info(part->first);
    uint8_t *const frame = pager_frame(heap, part->first);
    const uint64_t *const versions = &heap->meta.versions[part->first - heap->meta.base];

    PYE_TRY(pye_pages_open(part->key, frame, frame, heap_meta_tag(&heap->meta, part->first),
                           versions, 0, part->num, &info));
    return pager_show(heap, part->first, part->num, part->clean);
}

/* open_by_two does so with the helper's help; it returns 0 if there is none, or not for this. */
static int open_by_two(pye_status *out, pye_heap *heap, uint32_t page, uint32_t num, int clean)
{
    /* By mprotect, or where each page is locked, showing may take pages back. */
    if (num < PAGER_SHARED || heap->mechanism != PYE_HEAP_USERFAULTFD ||
        heap->locks == PYE_HEAP_LOCK_SHOWN) {
        return 0;
    }
    pager_part part = {open_part, one_key(heap, page, num), page, num / 2, clean};
    const pager_part rest = {open_part, part.key, page + part.num, num - part.num, clean};

    if (part.key == NULL || !pager_offer(heap, &rest)) {
        return 0;
    }
    const pye_status mine = open_part(heap, &part);
    const int saved = errno;
    *out = pager_collect(heap);
    if (mine != PYE_OK) {
        *out = mine;
        errno = saved;
    }
    return 1;
}

/* open_and_show is what cold pages need that are in their frames. */
static pye_status open_and_show(pye_heap *heap, uint32_t page, uint32_t num, int clean)
{
    pye_status rc;

    if (open_by_two(&rc, heap, page, num, clean)) {
        return rc;
    }
    PYE_TRY(open_pages(heap, page, num));
    return show(heap, page, num, 1, clean);
}

pye_status pager_bring(pye_heap *heap, uint32_t page, uint32_t num, int write, int passing)
{
    const int cold = heap_meta_version(&heap->meta, page) != 0;
    const int clean = heap->tracks && !write;
    pye_status rc = PYE_OK;

    /* They count, and would be wiped, from before there is plaintext. */
    for (uint32_t i = 0; i < num; i++) {
        heap_queue_add(&heap->queue, page + i, passing);
        heap_queue_mark(&heap->queue, page + i, clean);
    }
    if (heap->queue.used > heap->stats.resident_peak) {
        heap->stats.resident_peak = heap->queue.used;
    }
    if (cold && heap->fd >= 0) {
        rc = pager_file_read(heap, page, num);
    }
    if (rc == PYE_OK) {
        rc = cold ? open_and_show(heap, page, num, clean) : show(heap, page, num, 0, clean);
    }
    heap->stats.pages_in += cold ? num : 0;
    heap->stats.zero_pages += cold ? 0 : num;
    /* An eviction that failed has ended the heap already. */
    return rc == PYE_OK || rc == PYE_E_POISONED ? rc : pager_poison(heap, rc, page);
}

pye_status pager_changes(pye_heap *heap, uint32_t page, uint32_t num)
{
    const pye_status rc = pager_unprotect(heap, page, num);

    if (rc != PYE_OK) {
        return pager_poison(heap, rc, page);
    }
    for (uint32_t i = 0; i < num; i++) {
        heap_queue_mark(&heap->queue, page + i, 0);
    }
    return PYE_OK;
}

/* alike tells whether a page can be brought in one step with one that is cold, or is zeros. */
static inline int alike(const pye_heap *heap, uint32_t page, int cold)
{
    return !heap_queue_has(&heap->queue, page) &&
           (heap_meta_version(&heap->meta, page) != 0) == cold;
}

uint32_t pager_same(const pye_heap *heap, uint32_t page, uint32_t num)
{
    const int cold = heap_meta_version(&heap->meta, page) != 0;
    const uint32_t most = num < heap->num_pages - page ? num : heap->num_pages - page;
    uint32_t same = 0;

    while (same < most && alike(heap, page + same, cold)) {
        same++;
    }
    return same;
}

/* same_below is pager_same downwards. */
static uint32_t same_below(const pye_heap *heap, uint32_t page, uint32_t num)
{
    const int cold = heap_meta_version(&heap->meta, page) != 0;
    uint32_t same = 0;

    while (same < num && same <= page && alike(heap, page - same, cold)) {
        same++;
    }
    return same;
}

/* expected returns the page whose fault goes on with a sequence: beyond what is resident. */
static uint32_t expected(const pye_heap *heap, uint32_t page, uint32_t num, int32_t step)
{
    int64_t next = step > 0 ? (int64_t)page + num : (int64_t)page - 1;

    for (int i = 0; i < PYE_HEAP_MAX_WINDOW; i++) {
        if (next < 0 || next >= heap->num_pages) {
            return HEAP_NO_PAGE;
        }
        if (!heap_queue_has(&heap->queue, (uint32_t)next)) {
            break;
        }
        next += step;
    }
    return (uint32_t)next;
}

/* fetch asks for the memory that opening a page will read, while there is other work to do. */
static void fetch(const pye_heap *heap, uint32_t page)
{
    const uint8_t *const frame = pager_frame(heap, page);

    for (size_t i = 0; i < PYE_PAGE_SIZE; i += 64) {
        __builtin_prefetch(frame + i);
    }
}

/* serve brings a page that is not resident, and what will probably be wanted next. A sequence of
 * writes will write that, too. */
static pye_status serve(pye_heap *heap, uint32_t page, int write)
{
    fetch(heap, page);
    const heap_ahead ahead = heap_window_touch(&heap->window, page);
    /* What comes ahead must not push out what other sequences have just brought. */
    const uint32_t quarter = (heap->queue.num_slots - heap->queue.pinned) / 4;
    const uint32_t most = ahead.count < quarter ? ahead.count : quarter;
    const uint32_t low = ahead.step >= 0 ? page : page >= most ? page - most + 1 : 0;

    PYE_TRY(pager_look(heap, low, most));
    const uint32_t num = ahead.step < 0 ? same_below(heap, page, most)
                                        : pager_same(heap, page, most);
    const uint32_t first = ahead.step < 0 ? page - num + 1 : page;

    const int passing = !heap_queue_returns(&heap->queue, page, num) && ahead.step != 0;
    PYE_TRY(pager_make_room(heap, num)); /* enough is never pinned */
    PYE_TRY(pager_bring(heap, first, num, write, passing));
    heap->stats.read_ahead += num - 1;
    heap->stats.read_ahead_hits += ahead.hits;
    if (ahead.step != 0) {
        heap_window_brought(&heap->window, &ahead, expected(heap, first, num, ahead.step), num);
    }
    return PYE_OK;
}

/* fault_of_child lets a forked child read zeros: it has nothing of the heap, not even the range. */
static pye_status fault_of_child(uintptr_t address, uint32_t flags)
{
    const uintptr_t page = address - address % PYE_PAGE_SIZE;

    PYE_REFUSE_IF(!(flags & PYE_FAULT_UNMAPPED), PYE_E_ARGUMENT);
    void *const found = mmap((void *)page, PYE_PAGE_SIZE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    /* Another thread was faster, or somebody has mapped something there since. */
    PYE_REFUSE_IF(found == MAP_FAILED && errno == EEXIST, PYE_E_FORKED);
    if (found != MAP_FAILED && (uintptr_t)found != page) {
        (void)munmap(found, PYE_PAGE_SIZE); /* a kernel that does not know the flag */
    }
    PYE_REFUSE_IF((uintptr_t)found != page, PYE_E_ARGUMENT);
    return PYE_E_FORKED;
}

/* first_write serves a write to a page that was shown for reading, and lets those that a sequence
 * of writes comes to next be written. */
static pye_status first_write(pye_heap *heap, uint32_t page)
{
    const heap_ahead ahead = heap_window_touch(&heap->writes, page);
    uint32_t first = page;
    uint32_t num = 1;

    while (num < ahead.count) {
        const uint32_t next = ahead.step > 0 ? first + num : first - 1; /* before 0: no page */

        if (next >= heap->num_pages || !heap_queue_clean(&heap->queue, next)) {
            break;
        }
        first = ahead.step > 0 ? first : next;
        num++;
    }
    heap_window_brought(&heap->writes, &ahead, ahead.step > 0 ? first + num : first - 1, num);
    return pager_changes(heap, first, num);
}

static pye_status fault(pye_heap *heap, uint32_t page, uint32_t flags)
{
    const int write = (flags & PYE_FAULT_WRITE) != 0;
    pye_status rc;

    /* Somebody has protected the page himself: it is mapped, and the access would fail for ever. */
    PYE_REFUSE_IF((flags & PYE_FAULT_SEGMENT) && heap->mechanism == PYE_HEAP_USERFAULTFD,
                  PYE_E_ARGUMENT);
    heap->stats.faults++;
    heap->stats.write_faults += (uint64_t)write;
    if (!heap_queue_has(&heap->queue, page)) {
        return serve(heap, page, write);
    }
    const int clean = heap_queue_clean(&heap->queue, page);
    if (write && clean) {
        PYE_TRY(first_write(heap, page));
    }
    /* Another thread was faster; or the kernel has taken the mapping back, which it may. */
    rc = pager_show(heap, page, 1, clean && !write);
    return rc == PYE_OK ? PYE_OK : pager_poison(heap, rc, page);
}

pye_status pye_heap_fault(pye_heap *heap, uintptr_t address, uint32_t flags)
{
    const int saved = errno;
    pye_status rc;

    PYE_REFUSE_IF(flags & (PYE_FAULT_EXECUTE | PYE_FAULT_FOREIGN), PYE_E_ARGUMENT);
    if (!pye_heap_live(heap)) {
        rc = fault_of_child(address, flags);
    } else {
        const uintptr_t page = (address - (uintptr_t)heap->view) / PYE_PAGE_SIZE;

        PYE_REFUSE_IF(page >= heap->num_pages, PYE_E_ARGUMENT);
        pager_lock(&heap->lock);
        rc = heap->ended == PYE_OK ? fault(heap, (uint32_t)page, flags) : PYE_OK;
        if (heap->ended != PYE_OK) { /* just now, or before */
            rc = flags & PYE_FAULT_TELL ? (pye_status)heap->ended
                                        : pager_ended_fault(heap, (uint32_t)page);
        }
        pager_unlock(&heap->lock);
    }
    errno = saved;
    return rc;
}

#else
typedef int pye_pager_bring_is_for_linux; /* ISO C wants a declaration */
#endif
