/* stats.c - counters of calls, one cell for each lane and function. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "pyenclave/stats.h"

#define FIRST 7  /* the first power of two with buckets of its own: 128 ns */
#define LAST 36  /* the last one: up to 137 s */
#define NO_START 0

_Static_assert(PYE_STATS_BUCKETS == 2 + 4 * (LAST - FIRST + 1), "buckets");

/* What is known of the calls under way on a lane; only its owner looks. */
typedef struct {
    uint64_t start; /* of the outermost call, if it is timed */
    uint32_t depth; /* calls begun and not answered */
    uint8_t pad[52];
} lane_state; /* a cache line each */

struct pye_stats {
    uint64_t (*clock)(void);
    uint32_t lanes;
    uint32_t functions; /* the cell after them is that of the others */
    int enabled;
    uint64_t events[PYE_STATS_EVENTS];
    lane_state *states;
    pye_stats_counts *cells; /* lane after lane */
};

static uint64_t get(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

/* One writer at a time: no locked instruction is needed. */
static void add(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}

pye_status pye_stats_new(pye_stats **out, uint32_t lanes, uint32_t functions,
                         uint64_t (*clock)(void))
{
    pye_stats *stats;
    uint32_t most;

    *out = NULL;
    PYE_REFUSE_IF(lanes == 0 || lanes > PYE_LANE_MAX_LANES || clock == NULL, PYE_E_ARGUMENT);
    most = PYE_STATS_MAX_CELLS / lanes - 1;
    stats = calloc(1, sizeof(*stats));
    PYE_REFUSE_IF(stats == NULL, PYE_E_NO_MEMORY);
    stats->clock = clock;
    stats->lanes = lanes;
    stats->functions = functions < most ? functions : most;
    stats->enabled = 1;
    stats->states = calloc(lanes, sizeof(*stats->states));
    stats->cells = calloc((size_t)lanes * (stats->functions + 1), sizeof(*stats->cells));
    if (PYE_GUARD(stats->states == NULL || stats->cells == NULL)) {
        pye_stats_free(stats);
        return PYE_E_NO_MEMORY;
    }
    *out = stats;
    return PYE_OK;
}

void pye_stats_free(pye_stats *stats)
{
    if (stats != NULL) {
        free(stats->states);
        free(stats->cells);
        free(stats);
    }
}

uint32_t pye_stats_functions(const pye_stats *stats)
{
    return stats == NULL ? 0 : stats->functions;
}

void pye_stats_enable(pye_stats *stats, int on)
{
    if (stats != NULL) {
        __atomic_store_n(&stats->enabled, on, __ATOMIC_RELAXED);
    }
}

/* Returns the cell of a function on a lane, or NULL when nothing is counted. */
static pye_stats_counts *cell(pye_stats *stats, uint32_t lane, uint32_t function)
{
    PYE_REFUSE_IF(stats == NULL || lane >= stats->lanes ||
                      __atomic_load_n(&stats->enabled, __ATOMIC_RELAXED) == 0,
                  NULL);
    if (function > stats->functions) {
        function = stats->functions;
    }
    return &stats->cells[(size_t)lane * (stats->functions + 1) + function];
}

/* Whether the call after `before` others is timed: one in PYE_STATS_SAMPLE, evenly spread but
 * without a period that a program's own rhythm could hit (multiples of the golden ratio). */
static int is_sampled(uint64_t before)
{
    return (uint32_t)before * 2654435769u < UINT32_MAX / PYE_STATS_SAMPLE;
}

void pye_stats_time(pye_stats *stats, uint32_t lane, uint32_t function)
{
    const pye_stats_counts *counts = cell(stats, lane, function);

    if (counts != NULL && is_sampled(get(&counts->calls)) && stats->states[lane].depth == 0) {
        stats->states[lane].start = stats->clock();
    }
}

void pye_stats_begin(pye_stats *stats, uint32_t lane, uint32_t function,
                     const pye_segment *segments, size_t num)
{
    pye_stats_counts *counts = cell(stats, lane, function);
    uint64_t len = 0;

    if (counts == NULL) {
        return;
    }
    for (size_t i = 0; i < num; i++) {
        len += segments[i].len;
    }
    add(&counts->calls, 1);
    add(&counts->bytes_in, len);
    stats->states[lane].depth++;
}

static void record(pye_stats_counts *counts, uint64_t nanoseconds)
{
    add(&counts->samples, 1);
    add(&counts->nanoseconds, nanoseconds);
    add(&counts->buckets[pye_stats_bucket(nanoseconds)], 1);
}

void pye_stats_answer(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t len)
{
    pye_stats_counts *counts = cell(stats, lane, function);
    lane_state *state;

    if (counts == NULL) {
        return;
    }
    add(&counts->bytes_out, len);
    state = &stats->states[lane];
    if (state->depth == 0) {
        return; /* begun while nothing was counted */
    }
    state->depth--;
    if (state->depth == 0 && state->start != NO_START) {
        record(counts, stats->clock() - state->start);
        state->start = NO_START;
    }
}

void pye_stats_batch(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t calls,
                     uint64_t raised, uint64_t bytes_in, uint64_t bytes_out)
{
    pye_stats_counts *counts = cell(stats, lane, function);

    if (counts != NULL) {
        add(&counts->calls, calls);
        add(&counts->raised, raised);
        add(&counts->bytes_in, bytes_in);
        add(&counts->bytes_out, bytes_out);
    }
}

void pye_stats_failed(pye_stats *stats, uint32_t lane, uint32_t function, int how)
{
    pye_stats_counts *counts = cell(stats, lane, function);

    if (counts != NULL) {
        add(how == PYE_STATS_REFUSED ? &counts->refused : &counts->raised, 1);
    }
}

void pye_stats_finish(pye_stats *stats, uint32_t lane)
{
    if (stats != NULL && lane < stats->lanes && stats->states[lane].depth != 0) {
        stats->states[lane].depth = 0;
        stats->states[lane].start = NO_START;
    }
}

void pye_stats_event(pye_stats *stats, uint32_t event)
{
    if (stats != NULL && event < PYE_STATS_EVENTS) {
        (void)__atomic_fetch_add(&stats->events[event], 1, __ATOMIC_RELAXED);
    }
}

void pye_stats_depth(pye_stats *stats, uint64_t waiting)
{
    uint64_t *most;
    uint64_t seen;

    if (stats == NULL) {
        return;
    }
    most = &stats->events[PYE_STATS_DEPTH];
    seen = get(most);
    while (waiting > seen && !__atomic_compare_exchange_n(most, &seen, waiting, 1,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

pye_status pye_stats_read(const pye_stats *stats, uint32_t function, pye_stats_counts *out)
{
    memset(out, 0, sizeof(*out));
    PYE_REFUSE_IF(stats == NULL || function > stats->functions, PYE_E_ARGUMENT);
    for (uint32_t lane = 0; lane < stats->lanes; lane++) {
        const pye_stats_counts *counts =
            &stats->cells[(size_t)lane * (stats->functions + 1) + function];
        const uint64_t calls = get(&counts->calls);

        if (calls == 0) {
            continue; /* and do not touch the rest of its memory */
        }
        out->calls += calls;
        out->raised += get(&counts->raised);
        out->refused += get(&counts->refused);
        out->bytes_in += get(&counts->bytes_in);
        out->bytes_out += get(&counts->bytes_out);
        out->samples += get(&counts->samples);
        out->nanoseconds += get(&counts->nanoseconds);
        for (uint32_t i = 0; i < PYE_STATS_BUCKETS; i++) {
            out->buckets[i] += get(&counts->buckets[i]);
        }
    }
    return PYE_OK;
}

void pye_stats_events(const pye_stats *stats, uint64_t out[PYE_STATS_EVENTS])
{
    for (uint32_t i = 0; i < PYE_STATS_EVENTS; i++) {
        out[i] = stats == NULL ? 0 : get(&stats->events[i]);
    }
}

uint32_t pye_stats_bucket(uint64_t nanoseconds)
{
    uint32_t power;

    if (nanoseconds < 1u << FIRST) {
        return 0;
    }
    power = 63u - (uint32_t)__builtin_clzll(nanoseconds);
    if (power > LAST) {
        return PYE_STATS_BUCKETS - 1;
    }
    return 1 + (power - FIRST) * 4 + (uint32_t)(nanoseconds >> (power - 2) & 3);
}

uint64_t pye_stats_bound(uint32_t bucket)
{
    uint32_t power;

    if (bucket == 0) {
        return 1u << FIRST;
    }
    if (bucket >= PYE_STATS_BUCKETS - 1) {
        return UINT64_MAX;
    }
    power = FIRST + (bucket - 1) / 4;
    return (UINT64_C(1) << power) + (uint64_t)((bucket - 1) % 4 + 1) * (UINT64_C(1) << (power - 2));
}
