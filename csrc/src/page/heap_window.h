/* heap_window.h - read-ahead: what else to bring when a page is touched.
 *
 * Several sequences are followed at once (an addition of two arrays into a third is three). One
 * begins with any fault; a second fault on the page after it, or before it, brings four pages, and
 * each further one in that direction twice as many as the last. */
#ifndef PYE_SRC_PAGE_HEAP_WINDOW_H
#define PYE_SRC_PAGE_HEAP_WINDOW_H

#include <stdint.h>

#define HEAP_STREAMS 16
#define HEAP_NO_PAGE UINT32_MAX

typedef struct {
    uint32_t up[HEAP_STREAMS];   /* the page whose touch goes on upwards, or HEAP_NO_PAGE */
    uint32_t down[HEAP_STREAMS]; /* … downwards */
    uint32_t window[HEAP_STREAMS];
    uint32_t turn; /* the stream that the next beginning replaces */
    uint32_t largest;
} heap_window;

/* What to bring: `count` pages, the touched one first and the others upwards (step 1) or downwards
 * (step -1) from it. */
typedef struct {
    uint32_t stream;
    uint32_t count;
    int32_t step;
    uint32_t hits; /* pages that were brought ahead before and that this touch proves right */
} heap_ahead;

void heap_window_init(heap_window *window, uint32_t largest);

/* heap_window_touch looks a touched page up. */
heap_ahead heap_window_touch(heap_window *window, uint32_t page);

/* heap_window_brought tells where the sequence stands: `next` is the page whose touch goes on with
 * it, HEAP_NO_PAGE if the heap ends there; `count` how many were brought. */
void heap_window_brought(heap_window *window, const heap_ahead *ahead, uint32_t next,
                         uint32_t count);

#endif
