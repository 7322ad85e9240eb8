/* copy.c - copies between private memory and a slot, and which stores they take.
 *
 * Every length here was checked, and every address is of private numbers: nothing looks at what is
 * copied. The stores past the caches are of SSE2, which every x86-64 has. */
#include "call/copy.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define LINE 64
#define LEAST 4096 /* less is not worth a loop of its own */
#define ZERO_PAST 4096
#define PAUSE_SHORTEST 16
#define PAUSE_LONGEST 1024

void pye_copy_init(copy_choice *choice)
{
    memset(choice, 0, sizeof(*choice));
    choice->until = 1; /* the first message one way, the second the other */
    choice->pause = PAUSE_SHORTEST;
}

void pye_copy_choose(copy_choice *choice)
{
#if defined(__x86_64__)
    choice->began = 0;
    choice->way = choice->better;
    if (choice->until == 0) {
        choice->way = 1 - choice->better;
    } else {
        choice->until--;
    }
#else
    choice->way = COPY_CACHED;
#endif
}

void pye_copy_began(copy_choice *choice, uint64_t now)
{
    choice->began = now;
}

void pye_copy_ended(copy_choice *choice, uint64_t now, uint64_t len, uint64_t unseen)
{
    const uint32_t way = choice->way;
    const uint64_t ticks = now - choice->began;
    const uint64_t old = choice->cost[way];

    if (choice->began == 0 || len < 1024) {
        return;
    }
    const uint64_t cost = ticks / (len / 1024) + 1 + (way == COPY_PAST ? unseen : 0);
    if (old == 0 || cost <= old) {
        choice->cost[way] = cost;
    } else { /* who lost the processor for a moment is not taken for slow */
        choice->cost[way] = old + ((cost < 4 * old ? cost : 4 * old) - old) / 8 + 1;
    }
    const uint64_t mine = choice->cost[choice->better];
    const uint64_t other = choice->cost[1 - choice->better];
    if (other != 0 && other + other / 8 < mine) {
        choice->better = 1 - choice->better;
        choice->pause = PAUSE_SHORTEST;
        choice->until = PAUSE_SHORTEST;
    } else if (way != choice->better) {
        choice->until = choice->pause;
        choice->pause = choice->pause < PAUSE_LONGEST ? choice->pause * 2 : PAUSE_LONGEST;
    }
}

#if defined(__x86_64__)

/* Returns how many bytes were copied: whole lines, from a line's beginning in `to`. */
static size_t copy_past(uint8_t *to, const uint8_t *from, size_t len)
{
    size_t done = 0;

    for (; len - done >= LINE; done += LINE) {
        const __m128i a = _mm_loadu_si128((const void *)(from + done));
        const __m128i b = _mm_loadu_si128((const void *)(from + done + 16));
        const __m128i c = _mm_loadu_si128((const void *)(from + done + 32));
        const __m128i d = _mm_loadu_si128((const void *)(from + done + 48));
        _mm_stream_si128((void *)(to + done), a);
        _mm_stream_si128((void *)(to + done + 16), b);
        _mm_stream_si128((void *)(to + done + 32), c);
        _mm_stream_si128((void *)(to + done + 48), d);
    }
    _mm_sfence(); /* a release orders them no more than that */
    return done;
}

static size_t copy_lines(uint8_t *to, const uint8_t *from, size_t len)
{
    size_t done = 0;

    for (; len - done >= LINE; done += LINE) {
        const __m128i a = _mm_loadu_si128((const void *)(from + done));
        const __m128i b = _mm_loadu_si128((const void *)(from + done + 16));
        const __m128i c = _mm_loadu_si128((const void *)(from + done + 32));
        const __m128i d = _mm_loadu_si128((const void *)(from + done + 48));
        _mm_storeu_si128((void *)(to + done), a);
        _mm_storeu_si128((void *)(to + done + 16), b);
        _mm_storeu_si128((void *)(to + done + 32), c);
        _mm_storeu_si128((void *)(to + done + 48), d);
    }
    return done;
}

static size_t to_line(const uint8_t *to)
{
    return (LINE - (uintptr_t)to % LINE) % LINE;
}

void pye_copy_into(uint8_t *to, const uint8_t *from, size_t len, uint32_t way)
{
    if (way == COPY_PAST && len >= LEAST) {
        const size_t head = to_line(to);

        memcpy(to, from, head);
        const size_t done = head + copy_past(to + head, from + head, len - head);
        to += done;
        from += done;
        len -= done;
    }
    memcpy(to, from, len);
}

void pye_copy_out(uint8_t *to, const uint8_t *from, size_t len)
{
    /* Twice as quick as libc's copy while the other core writes the next fragment: that one tells
     * the processor that all will be written, so nothing of it is fetched ahead. */
    if (len >= LEAST) {
        const size_t done = copy_lines(to, from, len);

        to += done;
        from += done;
        len -= done;
    }
    memcpy(to, from, len);
}

void pye_copy_zero(uint8_t *to, size_t len)
{
    if (len >= ZERO_PAST) {
        const size_t head = to_line(to);
        const __m128i zero = _mm_setzero_si128();

        memset(to, 0, head);
        to += head;
        len -= head;
        for (; len >= LINE; to += LINE, len -= LINE) {
            _mm_stream_si128((void *)to, zero);
            _mm_stream_si128((void *)(to + 16), zero);
            _mm_stream_si128((void *)(to + 32), zero);
            _mm_stream_si128((void *)(to + 48), zero);
        }
        _mm_sfence();
    }
    memset(to, 0, len);
}

#else

void pye_copy_into(uint8_t *to, const uint8_t *from, size_t len, uint32_t way)
{
    (void)way;
    memcpy(to, from, len);
}

void pye_copy_out(uint8_t *to, const uint8_t *from, size_t len)
{
    memcpy(to, from, len);
}

void pye_copy_zero(uint8_t *to, size_t len)
{
    memset(to, 0, len);
}

#endif
