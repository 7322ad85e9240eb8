/* pager_range.c - what users ask for themselves: prefetch, evict, pin, unpin, discard. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "linux/pager_lock.h"

/* Pages opened by one call of the cipher and shown by one of the kernel: what the second-level
 * cache of a processor holds. Between two such steps other threads may have their faults served. */
#define CHUNK 128

/* begin takes the lock of a heap that goes on, for an operation on pages. */
static pye_status begin(pye_heap *heap, uint64_t first, uint64_t num, sigset_t *before)
{
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    PYE_REFUSE_IF(first > heap->num_pages || num > heap->num_pages - first, PYE_E_ARGUMENT);
    pager_block(before);
    pager_lock(&heap->lock);
    if (PYE_GUARD(heap->ended != PYE_OK)) {
        const pye_status ended = (pye_status)heap->ended;

        pager_unlock(&heap->lock);
        pager_unblock(before);
        return ended;
    }
    return PYE_OK;
}

static void finish(pye_heap *heap, const sigset_t *before)
{
    pager_unlock(&heap->lock);
    pager_unblock(before);
}

/* breathe lets other threads have the lock. */
static pye_status breathe(pye_heap *heap)
{
    if (atomic_load_explicit(&heap->lock, memory_order_relaxed) == 2) {
        pager_unlock(&heap->lock);
        pager_lock(&heap->lock);
    }
    return (pye_status)heap->ended;
}

static inline uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* bring_run brings pages from `page` on that are alike, at most `most`; the first is not resident. */
static pye_status bring_run(pye_heap *heap, uint32_t page, uint32_t most, int write, uint32_t *num)
{
    PYE_TRY(pager_look(heap, page, smaller(most, CHUNK)));
    *num = pager_same(heap, page, smaller(most, CHUNK));
    PYE_TRY(pager_make_room(heap, *num));
    PYE_TRY(pager_bring(heap, page, *num, write, 0));
    heap->stats.prefetched += *num;
    return PYE_OK;
}

static pye_status prefetch(pye_heap *heap, uint64_t *shown, uint32_t page, uint32_t end)
{
    uint32_t room = heap->queue.num_slots - heap->queue.pinned;

    while (page < end && room != 0) {
        uint32_t num = 1;

        if (!heap_queue_has(&heap->queue, page)) {
            PYE_TRY(bring_run(heap, page, smaller(end - page, room), 0, &num));
            *shown += num;
            room -= num;
        } else if (heap_queue_pins(&heap->queue, page) == 0) {
            /* It is as new as the others: what comes now must not push it out. */
            heap_queue_renew(&heap->queue, page);
            room--;
        }
        page += num;
        PYE_TRY(breathe(heap));
        room = smaller(room, heap->queue.num_slots - heap->queue.pinned);
    }
    return PYE_OK;
}

pye_status pye_heap_prefetch(pye_heap *heap, uint64_t *out_shown, uint64_t first, uint64_t num)
{
    sigset_t before;
    pye_status rc;
    uint64_t shown = 0;

    if (out_shown != NULL) {
        *out_shown = 0;
    }
    PYE_TRY(begin(heap, first, num, &before));
    rc = prefetch(heap, &shown, (uint32_t)first, (uint32_t)(first + num));
    finish(heap, &before);
    if (out_shown != NULL && rc == PYE_OK) {
        *out_shown = shown;
    }
    return rc;
}

/* A walk over the resident pages of a range: over the range, or over the slots if they are fewer. */
typedef struct {
    uint32_t first;
    uint32_t end;
    uint32_t at;
    int slots;
} walk;

static walk walk_over(const pye_heap *heap, uint64_t first, uint64_t num)
{
    const int slots = num > heap->queue.fresh;

    return (walk){(uint32_t)first, (uint32_t)(first + num), slots ? 0 : (uint32_t)first, slots};
}

/* walk_next collects up to PAGER_BATCH of them that are not pinned. */
static uint32_t walk_next(pye_heap *heap, walk *w)
{
    const heap_queue *queue = &heap->queue;
    const uint32_t end = w->slots ? queue->fresh : w->end;
    uint32_t found = 0;

    for (; w->at < end && found < PAGER_BATCH; w->at++) {
        const uint32_t page = w->slots ? queue->slots[w->at].page : w->at;
        const int here = w->slots ? queue->slot_of[page] == w->at + 1 : heap_queue_has(queue, page);

        if (here && page >= w->first && page < w->end && heap_queue_pins(queue, page) == 0) {
            heap->victims[found++] = page;
        }
    }
    return found;
}

pye_status pye_heap_evict(pye_heap *heap, uint64_t *out_evicted, uint64_t first, uint64_t num)
{
    sigset_t before;
    pye_status rc = PYE_OK;
    uint64_t evicted = 0;
    uint32_t found;

    if (out_evicted != NULL) {
        *out_evicted = 0;
    }
    PYE_TRY(begin(heap, first, num, &before));
    walk w = walk_over(heap, first, num);
    while (rc == PYE_OK && (found = walk_next(heap, &w)) != 0) {
        rc = pager_evict(heap, heap->victims, found, 0);
        evicted += found;
        if (rc == PYE_OK) {
            rc = breathe(heap);
        }
    }
    finish(heap, &before);
    if (out_evicted != NULL && rc == PYE_OK) {
        *out_evicted = evicted;
    }
    return rc;
}

/* may_pin counts: all the range, or nothing. */
static pye_status may_pin(const pye_heap *heap, uint32_t first, uint32_t end)
{
    const uint32_t most = heap->queue.num_slots - PYE_HEAP_UNPINNED;
    uint32_t total = heap->queue.pinned;

    for (uint32_t page = first; page < end; page++) {
        const uint32_t pins = heap_queue_pins(&heap->queue, page);

        PYE_REFUSE_IF(pins == UINT32_MAX, PYE_E_LIMIT);
        total += pins == 0;
        PYE_REFUSE_IF(total > most, PYE_E_LIMIT);
    }
    return PYE_OK;
}

static pye_status pin(pye_heap *heap, uint32_t page, uint32_t end)
{
    pye_status rc;

    PYE_TRY(may_pin(heap, page, end));
    while (page < end) {
        uint32_t num = 1;

        if (heap_queue_has(&heap->queue, page)) {
            /* A system call may be about to write it, and would not be served. */
            if (heap_queue_clean(&heap->queue, page)) {
                PYE_TRY(pager_changes(heap, page, 1));
            }
            /* A resident page need not be in the view: pager_map.c, protect_all. */
            rc = pager_show(heap, page, 1, 0);
            if (rc != PYE_OK) {
                return pager_poison(heap, rc, page);
            }
        } else {
            PYE_TRY(bring_run(heap, page, end - page, 1, &num));
        }
        for (; num != 0; num--) {
            heap_queue_pin(&heap->queue, page++);
        }
    }
    return PYE_OK;
}

pye_status pye_heap_pin(pye_heap *heap, uint64_t first, uint64_t num)
{
    sigset_t before;
    pye_status rc;

    PYE_TRY(begin(heap, first, num, &before));
    rc = pin(heap, (uint32_t)first, (uint32_t)(first + num));
    finish(heap, &before);
    return rc;
}

static pye_status unpin(pye_heap *heap, uint32_t first, uint32_t end)
{
    for (uint32_t page = first; page < end; page++) {
        PYE_REFUSE_IF(heap_queue_pins(&heap->queue, page) == 0, PYE_E_STATE);
    }
    for (uint32_t page = first; page < end; page++) {
        heap_queue_unpin(&heap->queue, page);
    }
    return PYE_OK;
}

pye_status pye_heap_unpin(pye_heap *heap, uint64_t first, uint64_t num)
{
    sigset_t before;
    pye_status rc;

    PYE_TRY(begin(heap, first, num, &before));
    rc = unpin(heap, (uint32_t)first, (uint32_t)(first + num));
    finish(heap, &before);
    return rc;
}

/* wipe_batch hides pages and leaves zeros in their frames. */
static pye_status wipe_batch(pye_heap *heap, uint32_t num)
{
    const pye_status rc = pager_hide(heap, heap->victims, num);

    if (rc != PYE_OK) {
        return pager_poison(heap, rc, heap->victims[0]);
    }
    for (uint32_t i = 0; i < num; i++) {
        pye_wipe(pager_frame(heap, heap->victims[i]), PYE_PAGE_SIZE);
        heap_queue_remove(&heap->queue, heap->victims[i]);
    }
    return PYE_OK;
}

static pye_status discard(pye_heap *heap, uint32_t first, uint32_t end)
{
    pye_status rc;
    uint32_t found;

    if (first == end) {
        return PYE_OK;
    }
    for (uint32_t page = first; heap->queue.pinned != 0 && page < end; page++) {
        PYE_REFUSE_IF(heap_queue_pins(&heap->queue, page) != 0, PYE_E_BUSY);
    }
    walk w = walk_over(heap, first, end - first);
    while ((found = walk_next(heap, &w)) != 0) {
        PYE_TRY(wipe_batch(heap, found));
    }
    rc = pager_punch(heap, first, end - first);
    if (rc == PYE_OK) {
        rc = heap_meta_clear(&heap->meta, first, end - first);
    }
    if (rc != PYE_OK) {
        return pager_poison(heap, rc, first);
    }
    if (heap->fd >= 0) {
        pager_file_forget(heap, first, end - first);
    }
    heap->stats.discarded += end - first;
    return PYE_OK;
}

pye_status pye_heap_discard(pye_heap *heap, uint64_t first, uint64_t num)
{
    sigset_t before;
    pye_status rc;

    PYE_TRY(begin(heap, first, num, &before));
    rc = discard(heap, (uint32_t)first, (uint32_t)(first + num));
    finish(heap, &before);
    return rc;
}

pye_status pye_heap_stats_read(pye_heap *heap, pye_heap_stats *out)
{
    sigset_t before;

    *out = (pye_heap_stats){0};
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    pager_block(&before);
    pager_lock(&heap->lock);
    *out = heap->stats;
    out->resident = heap->ended == PYE_OK ? heap->queue.used : 0;
    out->resident_limit = heap->queue.num_slots;
    out->pinned = heap->ended == PYE_OK ? heap->queue.pinned : 0;
    out->capacity = heap->num_pages;
    out->locked = heap->ended != PYE_OK || heap->locks == PYE_HEAP_LOCK_NONE ? 0 : out->resident;
    out->metadata_bytes = heap->size + heap->tree_size;
    if (heap->tree != NULL) {
        pye_tree_stats tree;

        pye_tree_read_stats(heap->tree, &tree);
        out->tree_levels = tree.levels;
        out->nodes_in = tree.loads;
        out->nodes_out = tree.stores;
    }
    finish(heap, &before);
    return PYE_OK;
}

#else
typedef int pye_pager_range_is_for_linux; /* ISO C wants a declaration */
#endif
