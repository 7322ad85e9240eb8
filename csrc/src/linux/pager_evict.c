/* pager_evict.c - pages out: hidden first, sealed afterwards, dropped where nothing changed. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"

/* seal encrypts hidden pages in their frames and notes their versions. */
static pye_status seal(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    pye_page_key *key;

    PYE_TRY(heap_meta_begin(&heap->meta, pages, num));
    for (uint32_t i = 0; i < num; i++) {
        uint8_t *const frame = pager_frame(heap, pages[i]);

        heap->jobs[i] = (pye_page_job){.in = frame, .out = frame, .info = pager_info(pages[i]),
                                       .tag = heap_meta_place(&heap->meta, i, pages[i])};
        heap->stats.reseals += (uint64_t)heap_meta_was(&heap->meta, i, pages[i]);
    }
    PYE_TRY(pye_epoch_to_seal(heap->key, &key, num));
    PYE_TRY(pye_page_jobs_seal(key, heap->jobs, num));
    if (heap->fd >= 0) {
        PYE_TRY(pager_file_write(heap, pages, num));
        PYE_TRY(pager_file_drop(heap, pages, num));
    }
    PYE_TRY(heap_meta_end(&heap->meta, heap->jobs, pages, num));
    heap->stats.pages_out += num;
    return PYE_OK;
}

/* drop forgets pages that are as they are in the file, or zeros. */
static pye_status drop(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        pye_wipe(pager_frame(heap, pages[i]), PYE_PAGE_SIZE);
    }
    PYE_TRY(pager_file_drop(heap, pages, num));
    heap->stats.clean_drops += num;
    return PYE_OK;
}

/* take_out does what has to be done with hidden pages. Nobody can change them any more; who touches
 * one waits for the lock. */
static pye_status take_out(pye_heap *heap, const uint32_t *pages, uint32_t num)
{
    uint32_t clean = 0;
    uint32_t changed = 0;

    if (!heap->tracks) {
        return seal(heap, pages, num);
    }
    for (uint32_t i = 0; i < num; i++) {
        if (heap_queue_clean(&heap->queue, pages[i])) {
            heap->sorted[clean++] = pages[i];
        }
    }
    for (uint32_t i = 0; i < num; i++) {
        if (!heap_queue_clean(&heap->queue, pages[i])) {
            heap->sorted[clean + changed++] = pages[i];
        }
    }
    if (clean != 0) {
        PYE_TRY(drop(heap, heap->sorted, clean));
    }
    return changed == 0 ? PYE_OK : seal(heap, heap->sorted + clean, changed);
}

pye_status pager_evict(pye_heap *heap, const uint32_t *pages, uint32_t num, int noted)
{
    pye_status rc = pager_hide(heap, pages, num);

    if (rc == PYE_OK) {
        rc = take_out(heap, pages, num);
    }
    if (rc != PYE_OK) {
        return pager_poison(heap, rc, pages[0]);
    }
    for (uint32_t i = 0; i < num; i++) {
        if (noted) {
            heap_queue_evict(&heap->queue, pages[i]);
        } else {
            heap_queue_remove(&heap->queue, pages[i]);
        }
    }
    heap->stats.evictions += num;
    heap->stats.batches++;
    return PYE_OK;
}

/* next_victims finds pages to evict, at most `most`: none that stays if passing ones are enough. */
static uint32_t next_victims(pye_heap *heap, uint32_t num, uint32_t most)
{
    const uint32_t passing = heap_queue_passing(&heap->queue);

    if (passing < most && passing + heap_queue_room(&heap->queue) >= num && passing != 0) {
        most = passing;
    }
    return heap_queue_oldest(&heap->queue, heap->victims, most < PAGER_BATCH ? most : PAGER_BATCH);
}

pye_status pager_make_room(pye_heap *heap, uint32_t num)
{
    const uint32_t wanted = num > heap->batch ? num : heap->batch;

    if (heap_queue_room(&heap->queue) >= num) {
        /* More than evictions leave: there is no need to let go. */
        if (heap_queue_room(&heap->queue) - num >= heap->batch) {
            heap_queue_settle(&heap->queue);
        }
        return PYE_OK;
    }
    do {
        const uint32_t found = next_victims(heap, num, wanted - heap_queue_room(&heap->queue));

        if (found == 0) {
            break; /* all others are pinned */
        }
        PYE_TRY(pager_evict(heap, heap->victims, found, 1));
    } while (heap_queue_room(&heap->queue) < num);
    return heap_queue_room(&heap->queue) >= num ? PYE_OK : PYE_E_LIMIT;
}

#else
typedef int pye_pager_evict_is_for_linux; /* ISO C wants a declaration */
#endif
