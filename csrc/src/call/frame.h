/* frame.h - one frame of a slot: its header is read once, or published, and who waits is woken. */
#ifndef PYE_SRC_CALL_FRAME_H
#define PYE_SRC_CALL_FRAME_H

#include "base/check.h"
#include "call/turn.h"

#include <string.h>

/* Take one frame: each word of the header is read once, then only the copy is used (BND-03). */
static inline pye_status take(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms)
{
    if (__atomic_load_n(word_at(lane->in, 0), __ATOMIC_RELAXED) == lane->seen) {
        PYE_TRY(pye_lane_await(lane, slice_ms));
    }
    const uint64_t first = __atomic_load_n(long_at(lane->in, 0), __ATOMIC_ACQUIRE);
    const uint64_t second = __atomic_load_n(long_at(lane->in, 8), __ATOMIC_RELAXED);
    const pye_lane_header header = {
        .sequence = (uint32_t)first,
        .kind = (uint16_t)(first >> 32),
        .index = (uint16_t)(first >> 48),
        .length = (uint32_t)second,
        .lane = (uint32_t)(second >> 32),
        .total = __atomic_load_n(long_at(lane->in, 16), __ATOMIC_RELAXED),
        .offset = __atomic_load_n(long_at(lane->in, 24), __ATOMIC_RELAXED),
    };
    PYE_REFUSE_IF(header.sequence != (lane->host ? lane->sequence : lane->sequence + 1),
                  broken(lane, "sequence"));
    PYE_REFUSE_IF(header.lane != lane->number, broken(lane, "lane"));
    PYE_REFUSE_IF(!is_ours_to_get(lane, header.kind), broken(lane, "kind"));
    PYE_REFUSE_IF(header.length > lane->slot_size, broken(lane, "length"));
    /* No sum is formed before both terms are known to be small enough (BND-02). */
    PYE_REFUSE_IF(header.offset > header.total || header.length > header.total - header.offset,
                  broken(lane, "offset"));
    PYE_REFUSE_IF((is_control(header.kind) || header.kind == PYE_FRAME_MORE ||
                   header.kind == PYE_FRAME_STOP) &&
                      (header.total != 0 || header.index != 0),
                  broken(lane, "control"));
    PYE_REFUSE_IF(header.length != fragment_length(lane, header.total, header.offset),
                  broken(lane, "fragment"));
    lane->in_at = payload_at(lane, lane->in_next, header.total, header.length);
    if (is_long(lane, header.total)) {
        lane->in_next = payload_after(lane, lane->in_at, header.length);
    }
    lane->sequence = header.sequence;
    lane->seen = header.sequence;
    *out = header;
    return PYE_OK;
}

/* BND-07: nothing of an earlier message stays behind the `length` bytes of this short one. */
static inline void clear_behind(pye_lane *lane, uint32_t length)
{
    const uint32_t end = PYE_LANE_HEADER_SIZE + length;

    if (lane->used > length) {
        pye_copy_zero(lane->out + end, lane->used - length);
    }
    lane->used = length;
    if (lane->dirty_end > end) {
        const uint32_t from = lane->dirty > end ? lane->dirty : end;
        pye_copy_zero(lane->out + from, lane->dirty_end - from);
    }
    lane->dirty_end = 0;
}

static inline void publish(pye_lane *lane, uint16_t kind, uint16_t index, uint32_t length,
                           uint64_t total, uint64_t offset)
{
    if (is_long(lane, total)) {
        lane->out_next = payload_after(lane, lane->out_at, length);
    } else if (!is_control(kind)) {
        clear_behind(lane, length);
    }
    __atomic_store_n(long_at(lane->out, 8), (uint64_t)lane->number << 32 | length,
                     __ATOMIC_RELAXED);
    __atomic_store_n(long_at(lane->out, 16), total, __ATOMIC_RELAXED);
    __atomic_store_n(long_at(lane->out, 24), offset, __ATOMIC_RELAXED);
    if (lane->host) {
        lane->sequence++;
    }
    const uint64_t first = (uint64_t)index << 48 | (uint64_t)kind << 32 | lane->sequence;
    __atomic_store_n(long_at(lane->out, 0), first, __ATOMIC_RELEASE);
    /* Either this load sees that the other side sleeps, or its look at the word sees ours. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(word_at(lane->theirs, STATE_ASLEEP), __ATOMIC_RELAXED) != 0) {
        pye_status rc = lane->ops.wake(word_at(lane->out, 0));
        (void)rc; /* it looks again after its slice */
    }
}

static inline void publish_control(pye_lane *lane, uint16_t kind)
{
    publish(lane, kind, 0, 0, 0, 0);
}

#endif
