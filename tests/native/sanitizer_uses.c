/* sanitizer_uses.c - uses counters and the MessagePack reader as their headers allow, so that a fault
 * put into them is reported by a sanitizer, and nothing else is. test_sanitizers.py. */
#include "pyenclave/call.h"
#include "pyenclave/stats.h"

#include <stdlib.h>
#include <string.h>

static uint64_t tick(void)
{
    static uint64_t now;

    return now += 1000;
}

static int count(void)
{
    pye_stats *stats;
    pye_stats_counts counts;
    const uint32_t functions = 40000;

    if (pye_stats_new(&stats, 1, functions, tick) != PYE_OK) {
        return 1;
    }
    pye_stats_time(stats, 0, functions + 7);
    pye_stats_begin(stats, 0, functions + 7, NULL, 0);
    pye_stats_answer(stats, 0, functions + 7, 9);
    const int wrong =
        pye_stats_read(stats, functions, &counts) != PYE_OK || counts.bytes_out != 9;
    pye_stats_free(stats);
    return wrong;
}

/* A text that says it is longer than its memory, and an item behind it. */
static int read_cut_short(void)
{
    static const uint8_t said[] = {0x92, 0xd9, 20, 'x'};
    uint8_t *memory = malloc(sizeof(said));

    if (memory == NULL) {
        return 1;
    }
    memcpy(memory, said, sizeof(said));
    const int wrong = pye_msgpack_check(memory, sizeof(said), 32) != PYE_E_ARGUMENT;
    free(memory);
    return wrong;
}

int main(void)
{
    const int wrong = count() | read_cut_short() << 1;

    return wrong == 0 ? 0 : 40 + wrong;
}
