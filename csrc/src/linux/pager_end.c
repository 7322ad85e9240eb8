/* pager_end.c - the end of a heap: everything hidden and wiped, and zeros for who still reads. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include <pthread.h>

#include "linux/pager.h"
#include "linux/pager_lock.h"

/* wipe_resident leaves no plaintext in the frames. */
static void wipe_resident(pye_heap *heap)
{
    for (uint32_t i = 0; i < heap->queue.fresh; i++) {
        const uint32_t page = heap->queue.slots[i].page;

        if (heap->queue.slot_of[page] == i + 1) {
            pye_wipe(pager_frame(heap, page), PYE_PAGE_SIZE);
        }
    }
}

void pager_end(pye_heap *heap, pye_status status)
{
    atomic_store_explicit(&heap->ended, (uint32_t)status, memory_order_release);
    /* Who runs in other threads loses the view before its frames change. */
    for (int i = 0; i < 2 && pager_reserve(heap) != PYE_OK; i++) {
        /* All is hidden, and what was split is joined: there are mappings to spare again. */
        (void)mprotect(heap->view, (size_t)heap->num_pages * PYE_PAGE_SIZE, PROT_NONE);
    }
    wipe_resident(heap);
    pager_drop_frames(heap);
    pye_epoch_key_destroy(heap->key);
    pye_tree_destroy(heap->tree);
}

pye_status pager_poison(pye_heap *heap, pye_status why, uint32_t page)
{
    heap->poison = why;
    heap->poison_page = page;
    heap->poison_errno = why == PYE_E_AUTH || why == PYE_E_LIMIT ? 0 : errno;
    pager_end(heap, PYE_E_POISONED);
    return PYE_E_POISONED;
}

pye_status pager_ended_fault(pye_heap *heap, uint32_t page)
{
    const pye_status status = (pye_status)heap->ended;
    uint32_t *const oldest = &heap->zeros[heap->next_zero];

    for (uint32_t i = 0; i < PAGER_ZEROS; i++) {
        if (heap->zeros[i] == page + 1) {
            return status; /* another thread was faster */
        }
    }
    /* Pages that were shown go again, so that later readers are noticed too. */
    if (*oldest != 0) {
        pager_zero_gone(heap, *oldest - 1);
    }
    *oldest = page + 1;
    heap->next_zero = (heap->next_zero + 1) % PAGER_ZEROS;
    PYE_REFUSE_IF(pager_zero_page(heap, page) != PYE_OK, PYE_E_ARGUMENT);
    return status;
}

void pye_heap_conceal(pye_heap *heap)
{
    sigset_t before;

    if (!pye_heap_live(heap)) {
        return; /* in a child: nothing is known of what was shown */
    }
    pager_block(&before);
    pager_lock(&heap->lock);
    for (uint32_t i = 0; i < PAGER_ZEROS; i++) {
        if (heap->zeros[i] != 0) {
            pager_zero_gone(heap, heap->zeros[i] - 1);
            heap->zeros[i] = 0;
        }
    }
    pager_unlock(&heap->lock);
    pager_unblock(&before);
}

#else
typedef int pye_pager_end_is_for_linux; /* ISO C wants a declaration */
#endif
