/* lane.h - the private end of a lane, for the files that make it up: lane.c (messages), frame.h
 * (their headers), turn.h (who may send what), await.c (waiting), note.c. docs/formats/ring.md. */
#ifndef PYE_SRC_CALL_LANE_H
#define PYE_SRC_CALL_LANE_H

#include "call/copy.h"
#include "call/spin.h"
#include "pyenclave/call.h"

#define ALIGNMENT 128 /* processors fetch lines in pairs */
/* The area of a slot has room for so many fragments. By the time a line is written again it has
 * mostly left the reader's second cache, where that has 1 MiB: to take it from there costs several
 * times more (bench/README.md). */
#ifndef PLACES /* tests */
#define PLACES 16
#endif
#ifndef AREA /* tests */
#define AREA 128 /* where it begins */
#endif
#define SHORT_PART 16   /* a short message is at most this part of a slot */
#define SHORT_LEAST 64u /* but so much may always be one */
#define LINE 64u        /* payloads in the area begin at a line */
#define STATE_ASLEEP 0
#define STATE_CPU 4
#define STATE_TAKEN 64 /* in a line of its own that nobody reads before the worker is gone */
#define STATE_NOTE 64  /* likewise, of a host: PYE_LANE_NOTE_SIZE bytes */

/* Where a side stands. Host: TURN first; worker: AWAIT first. */
enum phase {
    TURN,      /* may write a message */
    WRITING,   /* a fragment is out, more follow when the other side asks */
    AWAIT,     /* the first frame of a message is to come */
    ANNOUNCED, /* its header is checked, its payload is in the slot */
    READING,   /* the next fragment was asked for */
    ABORTING,  /* host: ABORT is out, ACK is to come */
    BROKEN
};

_Static_assert(PLACES >= 4, "what is written ahead is beside what is read, also where the area ends");

struct pye_lane {
    uint8_t *in;  /* the other side's slot */
    uint8_t *out; /* this side's slot */
    uint8_t *mine;
    uint8_t *theirs;
    pye_wait_ops ops;
    spin_state spin;
    const char *broken;
    uint64_t limit;
    uint64_t total;    /* of the message that is read */
    uint64_t received; /* of it */
    uint64_t sent;     /* of the one that is written */
    uint64_t whole;    /* its bytes */
    uint32_t slot_size;
    uint32_t number;
    uint32_t sequence; /* of the exchange that is under way */
    uint32_t seen;     /* last sequence taken from `in` */
    uint32_t used;     /* bytes of `out` that are not zero, of a short message */
    uint32_t dirty;    /* from here on in `out` long ones were */
    uint32_t dirty_end; /* up to here; 0: none */
    uint32_t half;     /* bytes of a fragment */
    uint32_t shorts;   /* bytes of the longest short message */
    uint32_t in_next;  /* of the area of `in`: where the next payload begins, if it fits there */
    uint32_t out_next; /* likewise */
    uint32_t in_at;    /* where in `in` the payload of the frame lies that was taken last */
    uint32_t out_at;   /* where in `out` that lies which is stored, published or not */
    copy_choice copy;  /* of messages of several fragments that are written */
    copy_choice piece; /* of long ones of one piece */
    int prepared;      /* the next fragment of the message that is written is in the slot */
    uint32_t cpu;      /* as published: number + 1, or 0 */
    uint32_t length;   /* of the fragment in the slot */
    uint16_t kind;     /* of the message that is read */
    uint16_t index;
    uint16_t writing; /* kind of the message that is written */
    uint16_t held;    /* OCALL or ITEM: what the host has to answer; else 0 */
    uint32_t depth;   /* calls under way */
    int dropping;     /* ABORTING: what is dropped is this side's own message */
    int host;
    int rest; /* what comes next is slept for at once */
    enum phase phase;
    int bulk;             /* the answer is to much data: */
    spin_state spin_bulk; /* judged apart */
    uint64_t named;       /* bytes in shared memory that the next message names */
};

static inline uint32_t *word_at(uint8_t *base, size_t offset)
{
    return (uint32_t *)(void *)(base + offset);
}

static inline uint64_t *long_at(uint8_t *base, size_t offset)
{
    return (uint64_t *)(void *)(base + offset);
}

static inline pye_status broken(pye_lane *lane, const char *check)
{
    lane->phase = BROKEN;
    lane->broken = check;
    return PYE_E_PROTOCOL;
}

/* How long the fragment at `offset` of a message of `total` bytes must be. */
static inline uint64_t fragment_length(const pye_lane *lane, uint64_t total, uint64_t offset)
{
    const uint64_t left = total - offset;

    return total <= lane->slot_size || left < lane->half ? left : lane->half;
}

static inline int is_long(const pye_lane *lane, uint64_t total)
{
    return total > lane->shorts;
}

/* Where in the slot a payload of `length` bytes lies, checked, of a message of `total`: behind the
 * header, or, of a long one, in the area behind the last that lay there. So while the receiver copies
 * one fragment, the sender writes the next. Of private numbers only, which both sides have alike. */
static inline uint32_t payload_at(const pye_lane *lane, uint32_t next, uint64_t total,
                                  uint32_t length)
{
    if (!is_long(lane, total)) {
        return PYE_LANE_HEADER_SIZE;
    }
    return AREA + (length > PLACES * lane->half - next ? 0 : next);
}

/* Where in the area the next one begins, after one that is published, or taken. */
static inline uint32_t payload_after(const pye_lane *lane, uint32_t at, uint32_t length)
{
    const uint32_t end = (at - AREA + length + LINE - 1) / LINE * LINE;

    return end < PLACES * lane->half ? end : 0;
}

/* await.c: wait until the other side's word moves on from what was last taken. PYE_E_TIMEOUT: it
 * did not in `slice_ms`. */
PYE_MUST_USE pye_status pye_lane_await(pye_lane *lane, uint32_t slice_ms);

#endif
