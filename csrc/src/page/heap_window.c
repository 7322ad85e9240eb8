/* heap_window.c - streams of faults, found by the page that each expects next. */
#include "page/heap_window.h"

#define FIRST_WINDOW 4

void heap_window_init(heap_window *window, uint32_t largest)
{
    *window = (heap_window){.largest = largest};
    for (int i = 0; i < HEAP_STREAMS; i++) {
        window->up[i] = HEAP_NO_PAGE;
        window->down[i] = HEAP_NO_PAGE;
    }
}

/* find returns the stream that expects `page`, or HEAP_STREAMS. */
static uint32_t find(const uint32_t *expected, uint32_t page)
{
    uint32_t found = HEAP_STREAMS;

    for (uint32_t i = 0; i < HEAP_STREAMS; i++) { /* no early end: vectors */
        found = expected[i] == page ? i : found;
    }
    return found;
}

heap_ahead heap_window_touch(heap_window *window, uint32_t page)
{
    heap_ahead ahead = {.step = 1};
    uint32_t i = find(window->up, page);

    if (i == HEAP_STREAMS) {
        i = find(window->down, page);
        ahead.step = -1;
    }
    if (i == HEAP_STREAMS) {
        i = window->turn;
        window->turn = (i + 1) % HEAP_STREAMS;
        window->window[i] = 1;
        window->up[i] = page + 1;
        window->down[i] = page - 1; /* of page 0: HEAP_NO_PAGE */
        ahead.step = 0;
    } else {
        ahead.hits = window->window[i] - 1;
        window->window[i] = window->window[i] < FIRST_WINDOW ? FIRST_WINDOW
                                                             : 2 * window->window[i];
    }
    if (window->window[i] > window->largest) {
        window->window[i] = window->largest;
    }
    ahead.stream = i;
    ahead.count = window->window[i];
    return ahead;
}

void heap_window_brought(heap_window *window, const heap_ahead *ahead, uint32_t next,
                         uint32_t count)
{
    if (ahead->step == 0) {
        return; /* both directions are still open */
    }
    window->up[ahead->stream] = ahead->step > 0 ? next : HEAP_NO_PAGE;
    window->down[ahead->stream] = ahead->step < 0 ? next : HEAP_NO_PAGE;
    window->window[ahead->stream] = count;
}
