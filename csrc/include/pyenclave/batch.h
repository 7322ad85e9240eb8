/* batch.h - many calls of one function in one message (docs/formats/ring.md, "Batches").
 *
 * A batch is private memory by the time that anything here looks at it: the lane copied it once.
 * What it says still is the other side's word, so all of it is checked before the first item is
 * given out; afterwards nothing can fail. No allocation, no system call. */
#ifndef PYENCLAVE_BATCH_H
#define PYENCLAVE_BATCH_H

#include "pyenclave/base.h"

#define PYE_BATCH_HEADER_SIZE 64
#define PYE_BATCH_MAX_ITEMS 65536
#define PYE_BATCH_MAX_ALIGN 64

/* Forms. */
#define PYE_BATCH_EVEN 0  /* items of one size, back to back, all of them results */
#define PYE_BATCH_TABLE 1 /* a word for each item: its tag and its length */

/* Tags of items. A request has the first only. */
#define PYE_BATCH_ITEM 0    /* a call's arguments; in an answer: its result */
#define PYE_BATCH_ERROR 1   /* as the payload of an ERROR frame */
#define PYE_BATCH_STATUS 2  /* u32: what a native function answered instead of PYE_ECALL_OK */
#define PYE_BATCH_NOT_RUN 3 /* empty; from here on the items were not called */

/* A batch that is read. */
typedef struct pye_batch {
    const uint8_t *data;
    size_t at;        /* where the next item is */
    uint64_t size;    /* of each item, in the even form */
    uint32_t form;
    uint32_t count;
    uint32_t place;   /* of the next item */
    uint32_t align;
    uint32_t budget_ms; /* of a request: after so long what is done may be answered; 0: no bound */
} pye_batch;

/* pye_batch_start returns where the items of a batch of `count` begin, a multiple of 64. */
size_t pye_batch_start(uint32_t form, uint32_t count);

/* pye_batch_open checks all of the batch at `data`: of items that begin at multiples of `align` (a
 * power of two, at most 64); `reply` is 1 for answers, 0 for requests. `data` must live as long as
 * `out` is used. PYE_E_ARGUMENT: it is not such a batch; `out` then has no items. */
PYE_MUST_USE pye_status pye_batch_open(pye_batch *out, const uint8_t *data, size_t len,
                                       uint32_t align, int reply);

/* pye_batch_next gives out the next item and returns 1, or returns 0 after the last. */
int pye_batch_next(pye_batch *batch, const uint8_t **item, size_t *item_len, uint32_t *tag);

/* pye_batch_head writes header and padding of a batch of `count` items to `out`, of
 * pye_batch_start(form, count) bytes. Words of a table stay as they are. */
void pye_batch_head(uint8_t *out, uint32_t form, uint32_t count, uint64_t size,
                    uint32_t budget_ms);
/* pye_batch_set writes the word of item `place` into the table of the batch at `out`. */
void pye_batch_set(uint8_t *out, uint32_t place, uint32_t tag, uint64_t len);

/* pye_batch_native calls the native function at `function` for each item of the request `in`,
 * and writes the answer into `arena`, aligned to 64 bytes. `reply` gets its place there, and
 * `used` how much of the arena is not zero any more. Items are called while less than half of
 * `arena_cap` is used, so that each has room for an answer of nearly the other half.
 * `forget(memory, len)` zeroes what a function that failed may have written. PYE_E_ARGUMENT: not
 * a batch. PYE_E_LIMIT: the arena is too small for the table. Nothing was called then. */
PYE_MUST_USE pye_status pye_batch_native(void *function, const uint8_t **reply, size_t *reply_len,
                                         size_t *used, uint8_t *arena, size_t arena_cap,
                                         const uint8_t *in, size_t in_len,
                                         void (*forget)(uint8_t *memory, size_t len));

/* pye_batch_gather copies the items of an answer, all results of `size` bytes, back to back to
 * `out`, of `out_len` bytes. PYE_E_LENGTH: an item is of another size or no result, or `out_len` is
 * not that of all. `batch` is read from its next item on. */
PYE_MUST_USE pye_status pye_batch_gather(pye_batch *batch, uint8_t *out, size_t out_len,
                                         uint64_t size);

#endif
