/* stats.h - counting calls: what crossed the lanes of one handle, and how long it took.
 *
 * A lane's counters have one writer, whoever owns the lane, so they are plain relaxed loads and
 * stores; the few counters of a whole handle are relaxed additions. Nothing is locked, and nothing
 * is allocated after pye_stats_new. A reader sees each counter whole, but not all of them at one
 * moment. No system call is made here: the caller gives the clock.
 *
 * Every function takes NULL for the handle and then does nothing. */
#ifndef PYENCLAVE_STATS_H
#define PYENCLAVE_STATS_H

#include "pyenclave/base.h"
#include "pyenclave/call.h"

/* One call in so many is timed, on average; the first of each function and lane always is. */
#define PYE_STATS_SAMPLE 64
/* Bucket 0 is below 128 ns, the last is 2^37 ns (137 s) or more; between them each power of two
 * has four of equal width, so that a value read off a bucket is at most 12.5 % off. */
#define PYE_STATS_BUCKETS 122
/* Functions with counters of their own, over all lanes; what is beyond is counted as one. */
#define PYE_STATS_MAX_CELLS 65536

/* Counters of a handle. */
#define PYE_STATS_ARGUMENT 0 /* calls that ended before they crossed: an argument did not fit */
#define PYE_STATS_BUSY 1     /* calls refused because too many waited */
#define PYE_STATS_TIMEOUT 2  /* calls whose deadline passed */
#define PYE_STATS_LOST 3     /* calls that ended with the worker */
#define PYE_STATS_POISONED 4 /* calls that ended with a broken protocol */
#define PYE_STATS_DEPTH 5    /* most calls that ever waited for a lane at the same time */
#define PYE_STATS_EVENTS 6

/* How a call that was answered failed. */
#define PYE_STATS_RAISED 1  /* the function raised, or answered a status */
#define PYE_STATS_REFUSED 2 /* it was not entered: no such function, or its arguments do not fit */

/* What is counted of one function. */
typedef struct pye_stats_counts {
    uint64_t calls;
    uint64_t raised;
    uint64_t refused;
    uint64_t bytes_in;  /* of requests, encoded */
    uint64_t bytes_out; /* of answers, encoded */
    uint64_t samples;   /* calls that were timed */
    uint64_t nanoseconds; /* that they took together */
    uint64_t buckets[PYE_STATS_BUCKETS];
} pye_stats_counts;

typedef struct pye_stats pye_stats;

/* pye_stats_new makes counters for `lanes` lanes and `functions` functions, all zero. Counters of
 * functions from PYE_STATS_MAX_CELLS / lanes on are those of "the others". Memory that is never
 * counted in is never touched. `clock` returns nanoseconds of a clock that only goes forward. */
PYE_MUST_USE pye_status pye_stats_new(pye_stats **out, uint32_t lanes, uint32_t functions,
                                      uint64_t (*clock)(void));
/* pye_stats_free releases the counters. NULL is nothing to do. */
void pye_stats_free(pye_stats *stats);
/* pye_stats_functions returns how many functions have counters of their own. */
uint32_t pye_stats_functions(const pye_stats *stats);
/* pye_stats_enable turns counting on (1, as it is at first) or off (0). */
void pye_stats_enable(pye_stats *stats, int on);

/* pye_stats_time reads the clock if the call that is about to go out on `lane`, which the caller
 * owns, is one of those that are timed. A call inside a call (of an ocall's handler) never is. */
void pye_stats_time(pye_stats *stats, uint32_t lane, uint32_t function);
/* pye_stats_begin counts that call, of `num` segments. After pye_stats_time, best when the call is
 * on its way already: then the counting happens while the other side works. */
void pye_stats_begin(pye_stats *stats, uint32_t lane, uint32_t function,
                     const pye_segment *segments, size_t num);
/* pye_stats_answer counts the answer, of `len` bytes, to the last call begun on `lane`. */
void pye_stats_answer(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t len);
/* pye_stats_batch counts `calls` calls that crossed as one message; they are not timed. */
void pye_stats_batch(pye_stats *stats, uint32_t lane, uint32_t function, uint64_t calls,
                     uint64_t raised, uint64_t bytes_in, uint64_t bytes_out);
/* pye_stats_failed counts how the call on `lane` failed: PYE_STATS_RAISED or PYE_STATS_REFUSED. */
void pye_stats_failed(pye_stats *stats, uint32_t lane, uint32_t function, int how);
/* pye_stats_finish forgets calls begun on `lane` that got no answer; before the lane is let go. */
void pye_stats_finish(pye_stats *stats, uint32_t lane);

/* pye_stats_event adds one to a counter of the handle. Any thread. */
void pye_stats_event(pye_stats *stats, uint32_t event);
/* pye_stats_depth notes that `waiting` calls wait. Any thread. */
void pye_stats_depth(pye_stats *stats, uint64_t waiting);

/* pye_stats_read sums a function's counters over all lanes; pye_stats_functions() is the others'.
 * Any thread. */
PYE_MUST_USE pye_status pye_stats_read(const pye_stats *stats, uint32_t function,
                                       pye_stats_counts *out);
/* pye_stats_events copies the handle's counters. Any thread. */
void pye_stats_events(const pye_stats *stats, uint64_t out[PYE_STATS_EVENTS]);
/* pye_stats_bucket returns the number of the bucket of a duration. */
uint32_t pye_stats_bucket(uint64_t nanoseconds);
/* pye_stats_bound returns the first duration in nanoseconds that is above a bucket; of the last,
 * and of what is no bucket, UINT64_MAX. */
uint64_t pye_stats_bound(uint32_t bucket);

#endif
