/* heap_queue.h - which pages of a heap are resident, and which goes first.
 *
 * One slot for each page that may be resident, so that the limit cannot be passed: there is no
 * slot for one more. Slots of pages that may be evicted hang in one of two lists, oldest first;
 * those of pinned pages do not.
 *
 * *Passing* pages were brought by a sequence of accesses, which mostly does not come back to them.
 * When room is needed they go before the others, all but the newest `keep`; what is needed beyond
 * them goes in the order in which it came. So a long scan pushes out nothing but itself, and what is
 * sealed again is still in the processor's cache. While there is room, passing pages become staying
 * ones instead. A wrong guess is noticed: an evicted passing page leaves the time of its eviction,
 * and if it is touched before as many were evicted as may be resident, it comes back as a staying
 * one and `keep` grows; else `keep` shrinks slowly. At its largest, and in small queues always, the
 * queue is first in, first out. Johnson and Shasha, "2Q", VLDB 1994; Megiddo and Modha,
 * "ARC", FAST 2003. Not thread-safe: the heap's lock is held. */
#ifndef PYE_SRC_PAGE_HEAP_QUEUE_H
#define PYE_SRC_PAGE_HEAP_QUEUE_H

#include <stddef.h>
#include <stdint.h>

#define HEAP_NO_SLOT UINT32_MAX

/* Fewest passing pages that are kept: half a megabyte, more than an instruction may touch at once;
 * and slots above which it is so few. A test has smaller ones. */
#ifndef HEAP_KEEP
#define HEAP_KEEP 128
#define HEAP_KEEP_ALL 512
#endif
/* How many evictions of passing pages make `keep` less by one. */
#define HEAP_KEEP_LESS 8

typedef struct {
    uint32_t page;
    uint32_t older; /* in the list; of a free slot: the next free one */
    uint32_t newer;
    uint32_t pins;
    uint16_t clean; /* has not changed since it came */
    uint16_t passing; /* the list that it hangs in */
    uint32_t came;    /* when, by the queue's `came` */
} heap_slot;

typedef struct {
    uint32_t oldest;
    uint32_t newest;
    uint32_t num;
} heap_list;

typedef struct {
    heap_slot *slots;
    /* page → slot + 1; 0, or HEAP_GONE and a time: not resident. Zero memory is an empty queue. */
    uint32_t *slot_of;
    uint32_t num_slots;
    uint32_t fresh;  /* slots from here on were never used */
    uint32_t free;   /* the last slot that was given back */
    uint32_t used;   /* resident pages */
    uint32_t pinned; /* those of them that are pinned */
    uint32_t keep;   /* newest passing pages that do not go before the staying ones */
    uint32_t came;   /* pages that became the newest so far */
    uint32_t time;   /* passing pages evicted so far, modulo HEAP_TIMES */
    heap_list lists[2]; /* staying pages, passing pages */
} heap_queue;

/* No slot has such a number: there are at most 2^31. */
#define HEAP_GONE 0x80000001u
#define HEAP_TIMES (UINT32_MAX - HEAP_GONE + 1)

/* heap_queue_init begins an empty queue; `slot_of` is zero memory of an entry for each page. */
void heap_queue_init(heap_queue *queue, heap_slot *slots, uint32_t num_slots, uint32_t *slot_of);

static inline int heap_queue_has(const heap_queue *queue, uint32_t page)
{
    return queue->slot_of[page] - 1 < queue->num_slots;
}

/* heap_queue_room returns how many pages may be added. */
static inline uint32_t heap_queue_room(const heap_queue *queue)
{
    return queue->num_slots - queue->used;
}

/* heap_queue_add makes a page that is not resident the newest. There must be room. */
void heap_queue_add(heap_queue *queue, uint32_t page, int passing);

/* heap_queue_returns tells whether a page that is not resident was evicted while it passed, and so
 * short a time ago that it would still be resident otherwise; then more are kept, up to twice the
 * `num` pages that are brought with it. */
int heap_queue_returns(heap_queue *queue, uint32_t page, uint32_t num);

/* heap_queue_passing returns how many passing pages go before all others. */
static inline uint32_t heap_queue_passing(const heap_queue *queue)
{
    const uint32_t num = queue->lists[1].num;

    return num > queue->keep ? num - queue->keep : 0;
}

/* heap_queue_settle makes passing pages stay, all but the newest `keep`; for when there is room. */
void heap_queue_settle(heap_queue *queue);

/* heap_queue_clean tells whether a page is resident and marked as unchanged; heap_queue_mark sets
 * that of a resident page, which begins without it. */
static inline int heap_queue_clean(const heap_queue *queue, uint32_t page)
{
    return heap_queue_has(queue, page) && queue->slots[queue->slot_of[page] - 1].clean != 0;
}

static inline void heap_queue_mark(heap_queue *queue, uint32_t page, int clean)
{
    queue->slots[queue->slot_of[page] - 1].clean = (uint16_t)clean;
}

/* heap_queue_renew makes a page that may be evicted the newest of those that stay. */
void heap_queue_renew(heap_queue *queue, uint32_t page);

/* heap_queue_remove takes out a resident page that is not pinned. heap_queue_evict does, and notes
 * when if it was passing. */
void heap_queue_remove(heap_queue *queue, uint32_t page);
void heap_queue_evict(heap_queue *queue, uint32_t page);

/* heap_queue_oldest writes up to `num` pages that may be evicted, in the order in which they should
 * be, and returns how many; they stay in the queue. */
uint32_t heap_queue_oldest(const heap_queue *queue, uint32_t *pages, uint32_t num);

/* heap_queue_pins returns how often a page is pinned; 0 if it is not resident. */
uint32_t heap_queue_pins(const heap_queue *queue, uint32_t page);

/* heap_queue_pin and heap_queue_unpin count; the page must be resident, or pinned. What is no longer
 * pinned becomes the newest of those that stay. */
void heap_queue_pin(heap_queue *queue, uint32_t page);
void heap_queue_unpin(heap_queue *queue, uint32_t page);

#endif
