/* pager_way.c - which pages make way for those that are being brought, long after the others came.
 *
 * Prints the pages that would be evicted. */
#define _GNU_SOURCE
#include "linux/pager.h"

#include <stdio.h>
#include <stdlib.h>

static pye_status print_victims(pye_heap *heap, const uint32_t *pages, uint32_t num, int noted)
{
    (void)heap;
    (void)noted;
    for (uint32_t i = 0; i < num; i++) {
        printf("%u\n", (unsigned)pages[i]);
    }
    return PYE_OK;
}

#define pager_evict print_victims
#include "linux/pager_bring.c"

#define SLOTS 1024u
#define PAGES 8192u
#define NUM 16u

int main(int argc, char **argv)
{
    pye_heap *heap = calloc(1, sizeof(*heap));
    heap_slot *slots = calloc(SLOTS, sizeof(*slots));
    uint32_t *slot_of = calloc(PAGES, sizeof(*slot_of));

    if (argc != 2 || heap == NULL || slots == NULL || slot_of == NULL) {
        return 2;
    }
    heap_queue_init(&heap->queue, slots, SLOTS, slot_of);
    heap_queue_add(&heap->queue, 5000, 0);
    /* A scan goes on: it pushes out its own pages only. */
    heap->queue.came += (uint32_t)strtoul(argv[1], NULL, 0);
    for (uint32_t page = 0; page < NUM; page++) {
        heap_queue_add(&heap->queue, page, 1);
    }
    const pye_status status = give_way(heap, 0, NUM);

    free(slot_of);
    free(slots);
    free(heap);
    return status == PYE_OK ? 0 : 1;
}
