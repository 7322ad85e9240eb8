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

/* stays tells whether a page of zeros is one of those that stay, `shown` whether it is shown at all. */
static int stays(const pye_heap *heap, uint32_t page)
{
    for (uint32_t i = 0; i < PAGER_ZEROS; i++) {
        if (heap->zeros[i] == page + 1) {
            return 1;
        }
    }
    return 0;
}

static int shown(const pye_heap *heap, uint32_t page)
{
    for (uint32_t i = 0; i < PAGER_STEPS; i++) {
        if (heap->steps[i].owner != 0 && heap->steps[i].page == page) {
            return 1;
        }
    }
    return stays(heap, page);
}

static void hide_unless_shown(pye_heap *heap, uint32_t page)
{
    if (!shown(heap, page)) {
        pager_zero_gone(heap, page);
    }
}

/* stay lets a page stay; another that did so goes, so that later readers are noticed too: the oldest,
 * or (`moved`) the one beside it, which an access that goes through memory has left. */
static void stay(pye_heap *heap, uint32_t page, int moved)
{
    uint32_t place = heap->next_zero;

    if (stays(heap, page)) {
        return;
    }
    for (uint32_t i = 0; moved && i < PAGER_ZEROS; i++) {
        const uint32_t other = heap->zeros[i]; /* page + 1 */

        if (other != 0 && (other == page || other == page + 2)) {
            place = i;
        }
    }
    if (place == heap->next_zero) {
        heap->next_zero = (heap->next_zero + 1) % PAGER_ZEROS;
    }
    const uint32_t gone = heap->zeros[place];
    heap->zeros[place] = page + 1;
    if (gone != 0) {
        hide_unless_shown(heap, gone - 1);
    }
}

/* note_step notes that an instruction of `owner` touches a page; 0: there is no room. */
static int note_step(pye_heap *heap, uint32_t page, uintptr_t owner)
{
    pager_step *room = NULL;

    for (uint32_t i = 0; i < PAGER_STEPS; i++) {
        pager_step *const step = &heap->steps[i];

        if (step->owner == owner && step->page == page) {
            return 1;
        }
        if (step->owner == 0) {
            room = step;
        }
    }
    if (room == NULL) {
        return 0;
    }
    *room = (pager_step){owner, page};
    return 1;
}

pye_status pager_ended_fault(pye_heap *heap, uint32_t page)
{
    stay(heap, page, 0);
    /* It may be shown already: another thread was faster. */
    PYE_REFUSE_IF(pager_zero_page(heap, page) != PYE_OK, PYE_E_ARGUMENT);
    return (pye_status)heap->ended;
}

/* show_for shows a page to an instruction of `owner`. */
static pye_status show_for(pye_heap *heap, uint32_t page, uintptr_t owner)
{
    PYE_REFUSE_IF(heap->ended == PYE_OK, PYE_E_STATE);
    const pye_status rc = owner != 0 && note_step(heap, page, owner) ? PYE_OK : PYE_E_LIMIT;

    if (rc != PYE_OK) {
        stay(heap, page, 0);
    }
    PYE_REFUSE_IF(pager_zero_page(heap, page) != PYE_OK, PYE_E_ARGUMENT);
    return rc;
}

pye_status pye_heap_zeros(pye_heap *heap, uintptr_t address, uintptr_t owner)
{
    PYE_REFUSE_IF(!pye_heap_live(heap), PYE_E_FORKED);
    const int saved = errno;
    const uintptr_t page = (address - (uintptr_t)heap->view) / PYE_PAGE_SIZE;

    PYE_REFUSE_IF(page >= heap->num_pages, PYE_E_ARGUMENT);
    pager_lock(&heap->lock);
    const pye_status rc = show_for(heap, (uint32_t)page, owner);
    pager_unlock(&heap->lock);
    errno = saved;
    return rc;
}

void pye_heap_stepped(pye_heap *heap, uintptr_t owner, int stay_shown)
{
    const int saved = errno;

    if (!pye_heap_live(heap)) {
        return; /* in a child: what was shown is not there */
    }
    pager_lock(&heap->lock);
    for (uint32_t i = 0; i < PAGER_STEPS; i++) {
        if (heap->steps[i].owner == owner) {
            heap->steps[i].owner = 0;
            if (stay_shown) {
                stay(heap, heap->steps[i].page, 1);
            } else {
                hide_unless_shown(heap, heap->steps[i].page);
            }
        }
    }
    pager_unlock(&heap->lock);
    errno = saved;
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
    for (uint32_t i = 0; i < PAGER_STEPS; i++) { /* whose instructions did not end fault once more */
        if (heap->steps[i].owner != 0) {
            heap->steps[i].owner = 0;
            pager_zero_gone(heap, heap->steps[i].page);
        }
    }
    pager_unlock(&heap->lock);
    pager_unblock(&before);
}

#else
typedef int pye_pager_end_is_for_linux; /* ISO C wants a declaration */
#endif
