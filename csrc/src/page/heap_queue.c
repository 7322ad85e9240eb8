/* heap_queue.c - the slots of resident pages, and the list of those that may be evicted. */
#include "page/heap_queue.h"

enum { STAYING, PASSING };

static uint32_t least_kept(const heap_queue *queue)
{
    return queue->num_slots > HEAP_KEEP_ALL ? HEAP_KEEP : queue->num_slots;
}

void heap_queue_init(heap_queue *queue, heap_slot *slots, uint32_t num_slots, uint32_t *slot_of)
{
    static const heap_list empty = {HEAP_NO_SLOT, HEAP_NO_SLOT, 0};

    *queue = (heap_queue){.slots = slots, .slot_of = slot_of, .num_slots = num_slots,
                          .free = HEAP_NO_SLOT, .lists = {empty, empty}};
    queue->keep = least_kept(queue);
}

static void append(heap_queue *queue, uint32_t slot, uint16_t passing)
{
    heap_slot *const s = &queue->slots[slot];
    heap_list *const list = &queue->lists[passing];

    s->passing = passing;
    s->older = list->newest;
    s->newer = HEAP_NO_SLOT;
    if (list->newest == HEAP_NO_SLOT) {
        list->oldest = slot;
    } else {
        queue->slots[list->newest].newer = slot;
    }
    list->newest = slot;
    list->num++;
}

static void append_newest(heap_queue *queue, uint32_t slot, uint16_t passing)
{
    queue->slots[slot].came = queue->came++;
    append(queue, slot, passing);
}

static void unlink_slot(heap_queue *queue, uint32_t slot)
{
    const heap_slot *const s = &queue->slots[slot];
    heap_list *const list = &queue->lists[s->passing];

    if (s->older == HEAP_NO_SLOT) {
        list->oldest = s->newer;
    } else {
        queue->slots[s->older].newer = s->newer;
    }
    if (s->newer == HEAP_NO_SLOT) {
        list->newest = s->older;
    } else {
        queue->slots[s->newer].older = s->older;
    }
    list->num--;
}

void heap_queue_add(heap_queue *queue, uint32_t page, int passing)
{
    uint32_t slot = queue->free;

    if (slot == HEAP_NO_SLOT) {
        slot = queue->fresh++;
    } else {
        queue->free = queue->slots[slot].older;
    }
    queue->slots[slot].page = page;
    queue->slots[slot].pins = 0;
    queue->slots[slot].clean = 0;
    queue->slot_of[page] = slot + 1;
    queue->used++;
    append_newest(queue, slot, passing ? PASSING : STAYING);
}

int heap_queue_returns(heap_queue *queue, uint32_t page, uint32_t num)
{
    const uint32_t noted = queue->slot_of[page];

    if (noted < HEAP_GONE) {
        return 0;
    }
    const uint32_t age = (queue->time + HEAP_TIMES - (noted - HEAP_GONE)) % HEAP_TIMES;
    if (age >= queue->num_slots) {
        return 0;
    }
    const uint32_t more = age < 2 * num ? age + 1 : 2 * num;
    const uint32_t left = queue->num_slots - queue->keep;

    queue->keep += more < left ? more : left;
    return 1;
}

void heap_queue_settle(heap_queue *queue)
{
    while (heap_queue_passing(queue) != 0) {
        const uint32_t slot = queue->lists[PASSING].oldest;

        unlink_slot(queue, slot);
        append(queue, slot, STAYING);
    }
}

void heap_queue_renew(heap_queue *queue, uint32_t page)
{
    const uint32_t slot = queue->slot_of[page] - 1;

    unlink_slot(queue, slot);
    append_newest(queue, slot, STAYING);
}

void heap_queue_remove(heap_queue *queue, uint32_t page)
{
    const uint32_t slot = queue->slot_of[page] - 1;

    unlink_slot(queue, slot);
    queue->slots[slot].older = queue->free;
    queue->free = slot;
    queue->slot_of[page] = 0;
    queue->used--;
}

void heap_queue_evict(heap_queue *queue, uint32_t page)
{
    const int passing = queue->slots[queue->slot_of[page] - 1].passing;

    heap_queue_remove(queue, page);
    if (!passing) {
        return;
    }
    queue->time = (queue->time + 1) % HEAP_TIMES;
    queue->slot_of[page] = HEAP_GONE + queue->time;
    if (queue->time % HEAP_KEEP_LESS == 0 && queue->keep > least_kept(queue)) {
        queue->keep--;
    }
}

/* came_first returns the list whose next page came before the other's. */
static int came_first(const heap_queue *queue, const uint32_t next[2])
{
    if (next[STAYING] == HEAP_NO_SLOT || next[PASSING] == HEAP_NO_SLOT) {
        return next[STAYING] == HEAP_NO_SLOT ? PASSING : STAYING;
    }
    const uint32_t between =
        queue->slots[next[PASSING]].came - queue->slots[next[STAYING]].came;

    return between > UINT32_MAX / 2 ? PASSING : STAYING;
}

uint32_t heap_queue_oldest(const heap_queue *queue, uint32_t *pages, uint32_t num)
{
    const uint32_t first = heap_queue_passing(queue);
    uint32_t next[2] = {queue->lists[STAYING].oldest, queue->lists[PASSING].oldest};
    uint32_t found = 0;

    while (found < num) {
        const int from = found < first ? PASSING : came_first(queue, next);

        if (next[from] == HEAP_NO_SLOT) {
            break;
        }
        pages[found++] = queue->slots[next[from]].page;
        next[from] = queue->slots[next[from]].newer;
    }
    return found;
}

uint32_t heap_queue_pins(const heap_queue *queue, uint32_t page)
{
    const uint32_t slot = queue->slot_of[page];

    return slot - 1 < queue->num_slots ? queue->slots[slot - 1].pins : 0;
}

void heap_queue_pin(heap_queue *queue, uint32_t page)
{
    const uint32_t slot = queue->slot_of[page] - 1;

    if (queue->slots[slot].pins++ == 0) {
        unlink_slot(queue, slot);
        queue->pinned++;
    }
}

void heap_queue_unpin(heap_queue *queue, uint32_t page)
{
    const uint32_t slot = queue->slot_of[page] - 1;

    if (--queue->slots[slot].pins == 0) {
        append_newest(queue, slot, STAYING);
        queue->pinned--;
    }
}
