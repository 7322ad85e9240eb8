/* turn.h - whose turn it is on a lane, and for what. docs/formats/ring.md, "Turns". */
#ifndef PYE_SRC_CALL_TURN_H
#define PYE_SRC_CALL_TURN_H

#include "call/lane.h"

static inline int is_control(uint16_t kind)
{
    return kind == PYE_FRAME_NEXT || kind == PYE_FRAME_ABORT || kind == PYE_FRAME_ACK;
}

static inline int is_call(uint16_t kind)
{
    return kind == PYE_FRAME_CALL || kind == PYE_FRAME_PING || kind == PYE_FRAME_ATTEST ||
           kind == PYE_FRAME_BATCH;
}

/* A message of the host whose kind is one that there is. */
static inline int is_of_host(uint16_t kind)
{
    return is_call(kind) || (kind >= PYE_FRAME_OCALL_RESULT && kind <= PYE_FRAME_STOP);
}

static inline int is_of_worker(uint16_t kind)
{
    return kind == PYE_FRAME_RESULT || kind == PYE_FRAME_ERROR || kind == PYE_FRAME_OCALL ||
           kind == PYE_FRAME_ITEM;
}

/* Whether the host, or else the worker, may begin a message of that kind now. */
static inline int in_turn(const pye_lane *lane, uint16_t kind, int by_host)
{
    if (!by_host) {
        return is_of_worker(kind) && lane->depth > 0 && lane->held == 0;
    }
    switch (lane->held) {
    case PYE_FRAME_OCALL:
        return kind == PYE_FRAME_CALL || kind == PYE_FRAME_OCALL_RESULT ||
               kind == PYE_FRAME_OCALL_ERROR;
    case PYE_FRAME_ITEM:
        return kind == PYE_FRAME_MORE || kind == PYE_FRAME_STOP;
    default:
        return is_call(kind) && lane->depth == 0;
    }
}

/* Whether the worker may answer before the whole message came, because it is too long: a call by an
 * error; an ocall's result by whatever the trusted function does then. */
static inline int is_early_answer(const pye_lane *lane, uint16_t kind)
{
    return lane->host && (kind == PYE_FRAME_ERROR ||
                          (lane->writing == PYE_FRAME_OCALL_RESULT && is_of_worker(kind)));
}

/* A call that ends goes back to the ocall in which it was nested. */
static inline void end_call(pye_lane *lane)
{
    lane->depth--;
    lane->held = lane->depth > 0 ? PYE_FRAME_OCALL : 0;
}

/* A message that was in turn began. */
static inline void began(pye_lane *lane, uint16_t kind)
{
    switch (kind) {
    case PYE_FRAME_RESULT:
    case PYE_FRAME_ERROR:
        end_call(lane);
        break;
    case PYE_FRAME_OCALL:
    case PYE_FRAME_ITEM:
        lane->held = kind;
        break;
    default:
        lane->depth += is_call(kind) ? 1 : 0;
        lane->held = 0;
        break;
    }
}

/* The host dropped a message of its own: as if it had never begun. */
static inline void undo(pye_lane *lane, uint16_t kind)
{
    if (is_call(kind)) {
        end_call(lane);
    } else {
        lane->held = PYE_FRAME_OCALL; /* MORE and STOP are one frame and never dropped */
    }
}

static inline int is_message(const pye_lane *lane, uint16_t kind)
{
    return lane->host ? is_of_worker(kind) : is_of_host(kind);
}

static inline int is_ours_to_get(const pye_lane *lane, uint16_t kind)
{
    if (is_control(kind)) {
        return lane->host == (kind == PYE_FRAME_ACK);
    }
    return is_message(lane, kind);
}

#endif
