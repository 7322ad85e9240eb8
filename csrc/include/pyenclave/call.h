/* call.h - calls through shared memory: lanes, messages, and checks of what crosses.
 *
 * A ring is shared memory of pye_ring_size bytes: one page, then a lane for each enclave thread.
 * A lane has two state areas and two slots (requests, written by the host; replies, written by
 * the worker); docs/formats/ring.md gives every byte. The two sides alternate strictly: request
 * n, reply n. A message longer than a slot crosses in fragments, each acknowledged, which lie in the
 * halves of the slot by turns: the sender writes one while the receiver copies the other.
 *
 * The private end knows whose turn it is, and for what. A call that is under way is answered by
 * RESULT or ERROR, or goes on later: after OCALL the host answers that or makes nested calls first;
 * after ITEM it asks for MORE or STOPs. Any other kind at that moment breaks the protocol.
 *
 * Untrusted: all of the memory, at any time. A side reads a header once, as four 64-bit words,
 * checks the copy, copies the payload once, and uses only what it copied. Everything that decides
 * is in the private pye_lane. No system call is made here: the caller gives the means to wait.
 *
 * A pye_lane belongs to one thread at a time. */
#ifndef PYENCLAVE_CALL_H
#define PYENCLAVE_CALL_H

#include "pyenclave/base.h"

#define PYE_RING_PAGE 4096
#define PYE_LANE_STATE_SIZE 256
#define PYE_LANE_HEADER_SIZE 32
#define PYE_LANE_NOTE_SIZE 64
#define PYE_LANE_MAX_LANES 1024
#define PYE_LANE_MIN_SLOT 96
#define PYE_LANE_MAX_SLOT 16777216
#define PYE_LANE_MAX_DEPTH 8 /* calls under way on one lane, for those who nest them */

/* Sides. */
#define PYE_SIDE_HOST 1
#define PYE_SIDE_WORKER 2

/* Kinds of frames. Of the host: */
#define PYE_FRAME_CALL 1   /* a call of function `index` */
#define PYE_FRAME_PING 2   /* echo */
#define PYE_FRAME_ATTEST 3 /* evidence over a nonce */
#define PYE_FRAME_NEXT 4   /* give the next fragment of the reply */
#define PYE_FRAME_ABORT 5  /* drop the message that is under way */
#define PYE_FRAME_BATCH 6  /* many calls of function `index`, packed */
#define PYE_FRAME_OCALL_RESULT 7 /* what the host function returned */
#define PYE_FRAME_OCALL_ERROR 8  /* why there is none; empty: nobody waits for the call any more */
#define PYE_FRAME_MORE 9         /* give the next item of the stream */
#define PYE_FRAME_STOP 10        /* end the stream */
/* Of the worker: */
#define PYE_FRAME_RESULT 129 /* what the function returned */
#define PYE_FRAME_ERROR 130  /* why there is no result */
#define PYE_FRAME_ACK 131    /* give the next fragment of the request; or: aborted */
#define PYE_FRAME_OCALL 132  /* call host function `index`, then go on with this call */
#define PYE_FRAME_ITEM 133   /* an item of a stream; more follow when asked for */

/* The header at the start of a slot; little-endian, as in memory. */
typedef struct pye_lane_header {
    uint32_t sequence; /* published last; the word that the other side waits on */
    uint16_t kind;
    uint16_t index;
    uint32_t length; /* bytes of this fragment, at most the slot */
    uint32_t lane;
    uint64_t total;  /* bytes of the whole message */
    uint64_t offset; /* where this fragment begins in the message */
} pye_lane_header;

/* One piece of a message that is gathered from several. */
typedef struct pye_segment {
    const uint8_t *data;
    size_t len;
} pye_segment;

/* How to wait; pye_wait_futex, pye_wake_futex, pye_wait_yield and the number of the CPU. */
typedef struct pye_wait_ops {
    pye_status (*wait)(uint32_t *word, uint32_t expected, uint32_t timeout_ms);
    pye_status (*wake)(uint32_t *word);
    void (*yield)(void);
    int (*cpu)(void);
} pye_wait_ops;

typedef struct pye_lane pye_lane;

/* pye_ring_size returns the size of a ring with `lanes` lanes of `slot_size` payload bytes each
 * way, and as many again for fragments, a multiple of PYE_RING_PAGE; 0 if one is out of range
 * (slots are multiples of 32). */
size_t pye_ring_size(uint32_t lanes, uint32_t slot_size);

/* pye_lane_new makes the private end `side` of lane `number` in `memory`, which must stay mapped
 * while the lane lives, be aligned to 128 bytes and have exactly the size of such a ring (else
 * PYE_E_LENGTH). `limit` caps the messages received. `ops` is copied. */
PYE_MUST_USE pye_status pye_lane_new(pye_lane **out, void *memory, size_t memory_len,
                                     uint32_t lanes, uint32_t slot_size, uint32_t number,
                                     uint32_t side, uint64_t limit, const pye_wait_ops *ops);
/* pye_lane_free releases a lane, not the memory under it. NULL is nothing to do. */
void pye_lane_free(pye_lane *lane);

/* pye_lane_names says that the next message names `len` bytes of memory that both sides map, so that
 * its answer is waited for as if they were in it. */
void pye_lane_names(pye_lane *lane, uint64_t len);

/* pye_lane_rest says that what comes next will be long in coming, and that the processor is wanted
 * elsewhere meanwhile: it is slept for at once, without looking for it first. */
void pye_lane_rest(pye_lane *lane);

/* pye_lane_write sends a message of `num` segments. PYE_E_TIMEOUT: `slice_ms` passed while the
 * other side had yet to take a fragment; call again with the same arguments to go on.
 * PYE_E_STATE: it is not this side's turn, or not for that kind, or another message is under way
 * (of another kind or length). PYE_E_PROTOCOL: the other side broke the protocol; the lane is
 * unusable from then on. PYE_E_CLOSED: the other side dropped the
 * message (worker); an ocall or an item is answered all the same. */
PYE_MUST_USE pye_status pye_lane_write(pye_lane *lane, uint16_t kind, uint16_t index,
                                       const pye_segment *segments, size_t num, uint32_t slice_ms);

/* pye_lane_wait waits for the first frame of a message and copies its checked header to `out`.
 * PYE_E_TIMEOUT: nothing came in `slice_ms`. PYE_E_PROTOCOL: as above. PYE_E_LIMIT: the message
 * is well formed but longer than the limit; `out` is set and an answer may be written. */
PYE_MUST_USE pye_status pye_lane_wait(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms);

/* pye_lane_read copies the message that pye_lane_wait announced to `out`, whose `out_len` must be
 * its `total`. PYE_E_TIMEOUT: call again with the same arguments. PYE_E_CLOSED: the other side
 * aborted it (worker). On failure other than PYE_E_TIMEOUT `out` is zeroed. */
PYE_MUST_USE pye_status pye_lane_read(pye_lane *lane, uint8_t *out, size_t out_len,
                                      uint32_t slice_ms);

/* pye_lane_read_split does the same into two buffers, one after the other: `head` gets the first
 * `head_len` bytes of the message, `body` the rest. Both lengths together must be its `total`. */
PYE_MUST_USE pye_status pye_lane_read_split(pye_lane *lane, uint8_t *head, size_t head_len,
                                            uint8_t *body, size_t body_len, uint32_t slice_ms);

/* pye_lane_drain brings a host's lane whose caller gave up back to where a call may begin,
 * dropping what still comes, ending streams and refusing ocalls. PYE_E_TIMEOUT: the worker is still
 * at it. Waits `slice_ms` for each of a few frames, and not at all if that is 0. */
PYE_MUST_USE pye_status pye_lane_drain(pye_lane *lane, uint32_t slice_ms);
/* pye_lane_drain_to does the same down to `depth` calls that are still under way. */
PYE_MUST_USE pye_status pye_lane_drain_to(pye_lane *lane, uint32_t depth, uint32_t slice_ms);

/* pye_lane_sequence returns the number of the exchange that is under way; after a message was
 * written whole, that of its last fragment. */
uint32_t pye_lane_sequence(const pye_lane *lane);
/* pye_lane_taken returns 1 if the worker says that it took the message with that number whole: from
 * then on a call may have begun. For the host, to be asked when the worker is gone. */
int pye_lane_taken(const pye_lane *lane, uint32_t sequence);

/* pye_lane_depth returns how many calls are under way on the lane, nested ones included. */
uint32_t pye_lane_depth(const pye_lane *lane);
/* pye_lane_held returns PYE_FRAME_OCALL or PYE_FRAME_ITEM while that waits for the host's answer,
 * else 0. */
uint16_t pye_lane_held(const pye_lane *lane);
/* pye_lane_refuse breaks the lane for a reason that only its user knows, such as an ocall that does
 * not exist. `check` names it and must be a literal. Returns PYE_E_PROTOCOL. */
pye_status pye_lane_refuse(pye_lane *lane, const char *check);

/* pye_lane_broken names the check that failed, or NULL while the protocol holds. */
const char *pye_lane_broken(const pye_lane *lane);
/* pye_lane_idle returns 1 when no call is under way and one may begin. */
int pye_lane_idle(const pye_lane *lane);
/* pye_lane_wake wakes this side's own waiting thread, so that its caller looks around. */
void pye_lane_wake(pye_lane *lane);

/* For a side that may not block, which calls the functions above with slices of 0: */

/* Ticks of pye_lane_look in a microsecond, roughly. */
#define PYE_LANE_TICKS 2500
/* pye_lane_look looks for the next frame for at most `*ticks`, less what it took, and returns
 * whether one is there. It does not look twice where the other side has the same processor. */
int pye_lane_look(pye_lane *lane, uint64_t *ticks);
/* pye_lane_arm tells the other side that this one sleeps, so that its next frame wakes whoever
 * waits (pye_watch_set) on `*word` while that is `*seen`. Returns 1, and tells nothing, if a frame
 * is there already. */
PYE_MUST_USE int pye_lane_arm(pye_lane *lane, uint32_t **word, uint32_t *seen);
/* pye_lane_disarm takes that back. */
void pye_lane_disarm(pye_lane *lane);

/* pye_lane_peer_asleep returns 1 when the other side says that it sleeps: a hint, for benchmarks. */
int pye_lane_peer_asleep(const pye_lane *lane);

/* pye_lane_note_set shows the other side `len` bytes that name what the next call is for, so that
 * the logs of both sides can be read together; 0 to take them back. Of a host, between calls.
 * PYE_E_ARGUMENT: longer than PYE_LANE_NOTE_SIZE, or other than letters, digits and "._:-". */
PYE_MUST_USE pye_status pye_lane_note_set(pye_lane *lane, const uint8_t *note, size_t len);
/* pye_lane_note_get copies what the other side shows to `out` and returns its length; 0 if there
 * is nothing, or not such a note. Untrusted: whoever asks may only print it. */
size_t pye_lane_note_get(const pye_lane *lane, uint8_t out[PYE_LANE_NOTE_SIZE]);

/* pye_index_mask returns `index` if it is below `num`, else 0, without a branch that a processor
 * could run past: for an index that was checked, before it is used. */
uint32_t pye_index_mask(uint32_t index, uint32_t num);

/* pye_msgpack_check walks one MessagePack value (private memory) without recursion or allocation.
 * PYE_OK: it is complete, fills `len` exactly, nests at most `max_depth` deep, holds at most
 * PYE_MSGPACK_MAX_ITEMS values (keys are values too), and has no extension but timestamps.
 * PYE_E_LIMIT: too deep, or too many. PYE_E_ARGUMENT: anything else. To be called before a decoder
 * sees the bytes: an empty map is one byte here, and sixty-four as an object. */
#define PYE_MSGPACK_MAX_ITEMS ((uint64_t)1 << 24)
PYE_MUST_USE pye_status pye_msgpack_check(const uint8_t *data, size_t len, uint32_t max_depth);

/* pye_native_call calls a native trusted function (pyenclave_trusted.h) at `function` with
 * private buffers, and checks the length it answers against `out_cap`. On any failure, and beyond
 * the answer, what the function wrote within `out_cap` is not given out: `out_len` is 0. */
PYE_MUST_USE pye_status pye_native_call(void *function, uint8_t *out, size_t out_cap,
                                        size_t *out_len, const uint8_t *in, size_t in_len);

#endif
