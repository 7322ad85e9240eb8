/* lane.c - one lane of a ring: headers checked on a private copy, messages in fragments.
 * docs/formats/ring.md. Threats: BND-01 to BND-08, BND-17, BND-20. */
#include "base/check.h"
#include "call/spin.h"
#include "pyenclave/call.h"

#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring's words are little-endian"
#endif

_Static_assert(sizeof(pye_lane_header) == PYE_LANE_HEADER_SIZE, "docs/formats/ring.md: header");
_Static_assert(offsetof(pye_lane_header, length) == 8, "docs/formats/ring.md: header");
_Static_assert(offsetof(pye_lane_header, offset) == 24, "docs/formats/ring.md: header");

#define ALIGNMENT 128 /* processors fetch lines in pairs */
#define PLACES 4 /* for fragments: a line that is written again has left the reader's cache by then */
#define DRAIN_STEPS 16 /* frames that one drain takes at most: a worker must not keep it for ever */
/* From so many bytes on who sends them looks for the answer as long as copying them a few times
 * takes, at 4 bytes a nanosecond: to sleep and to be woken in between costs half of that again. */
#define BULK 262144
#define BULK_LONGEST 2000000u /* ticks */
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
    uint32_t slot_size;
    uint32_t number;
    uint32_t sequence; /* of the exchange that is under way */
    uint32_t seen;     /* last sequence taken from `in` */
    uint32_t used;     /* bytes of `out` that are not zero */
    uint32_t half;     /* bytes of a fragment, one of PLACES */
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
    enum phase phase;
    int bulk;             /* the answer is to much data: */
    spin_state spin_bulk; /* judged apart */
    uint64_t named;       /* bytes in shared memory that the next message names */
};

static size_t slot_stride(uint32_t slot_size)
{
    const size_t raw = (size_t)PYE_LANE_HEADER_SIZE + (size_t)PLACES * (slot_size / 2);

    return (raw + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t lane_stride(uint32_t slot_size)
{
    return PYE_LANE_STATE_SIZE + 2 * slot_stride(slot_size);
}

size_t pye_ring_size(uint32_t lanes, uint32_t slot_size)
{
    PYE_REFUSE_IF(lanes == 0 || lanes > PYE_LANE_MAX_LANES || slot_size < PYE_LANE_MIN_SLOT ||
                      slot_size > PYE_LANE_MAX_SLOT || slot_size % 32 != 0,
                  0);
    const size_t raw = PYE_RING_PAGE + (size_t)lanes * lane_stride(slot_size);
    return (raw + PYE_RING_PAGE - 1) / PYE_RING_PAGE * PYE_RING_PAGE;
}

pye_status pye_lane_new(pye_lane **out, void *memory, size_t memory_len, uint32_t lanes,
                        uint32_t slot_size, uint32_t number, uint32_t side, uint64_t limit,
                        const pye_wait_ops *ops)
{
    pye_status rc;
    pye_lane *lane = NULL;
    const size_t want = pye_ring_size(lanes, slot_size);

    *out = NULL;
    PYE_REQUIRE(want != 0 && number < lanes, PYE_E_ARGUMENT);
    PYE_REQUIRE(side == PYE_SIDE_HOST || side == PYE_SIDE_WORKER, PYE_E_ARGUMENT);
    PYE_REQUIRE(memory != NULL && memory_len == want, PYE_E_LENGTH);
    PYE_REQUIRE((uintptr_t)memory % ALIGNMENT == 0, PYE_E_ALIGNMENT);
    lane = calloc(1, sizeof(*lane));
    PYE_REQUIRE(lane != NULL, PYE_E_NO_MEMORY);
    uint8_t *base = (uint8_t *)memory + PYE_RING_PAGE + (size_t)number * lane_stride(slot_size);
    uint8_t *request = base + PYE_LANE_STATE_SIZE;
    uint8_t *reply = request + slot_stride(slot_size);
    lane->host = side == PYE_SIDE_HOST;
    lane->mine = lane->host ? base : base + ALIGNMENT;
    lane->theirs = lane->host ? base + ALIGNMENT : base;
    lane->out = lane->host ? request : reply;
    lane->in = lane->host ? reply : request;
    lane->ops = *ops;
    lane->limit = limit;
    lane->slot_size = slot_size;
    lane->half = slot_size / 2;
    lane->number = number;
    lane->phase = lane->host ? TURN : AWAIT;
    spin_init(&lane->spin);
    spin_init(&lane->spin_bulk);
    *out = lane;
    rc = PYE_OK;
done:
    return rc;
}

void pye_lane_free(pye_lane *lane)
{
    free(lane);
}

const char *pye_lane_broken(const pye_lane *lane)
{
    return lane->broken;
}

int pye_lane_idle(const pye_lane *lane)
{
    return lane->phase == (lane->host ? TURN : AWAIT) && lane->depth == 0;
}

uint32_t pye_lane_sequence(const pye_lane *lane)
{
    return lane->sequence;
}

uint32_t pye_lane_depth(const pye_lane *lane)
{
    return lane->depth;
}

uint16_t pye_lane_held(const pye_lane *lane)
{
    return lane->held;
}

static uint32_t *word_at(uint8_t *base, size_t offset)
{
    return (uint32_t *)(void *)(base + offset);
}

static uint64_t *long_at(uint8_t *base, size_t offset)
{
    return (uint64_t *)(void *)(base + offset);
}

void pye_lane_wake(pye_lane *lane)
{
    pye_status rc = lane->ops.wake(word_at(lane->in, 0));
    (void)rc; /* the waiter looks around every slice anyway */
}

int pye_lane_peer_asleep(const pye_lane *lane)
{
    return __atomic_load_n(word_at(lane->theirs, STATE_ASLEEP), __ATOMIC_RELAXED) != 0;
}

int pye_lane_taken(const pye_lane *lane, uint32_t sequence)
{
    const uint32_t taken = __atomic_load_n(word_at(lane->theirs, STATE_TAKEN), __ATOMIC_ACQUIRE);

    return (int32_t)(taken - sequence) >= 0;
}

uint32_t pye_index_mask(uint32_t index, uint32_t num)
{
    uint64_t mask = (uint64_t)0 - (((uint64_t)index - (uint64_t)num) >> 63);

    __asm__ volatile("" : "+r"(mask)); /* keep the compiler from making a branch of it */
    return index & (uint32_t)mask;
}

static pye_status broken(pye_lane *lane, const char *check)
{
    lane->phase = BROKEN;
    lane->broken = check;
    return PYE_E_PROTOCOL;
}

pye_status pye_lane_refuse(pye_lane *lane, const char *check)
{
    return broken(lane, check);
}

/* ---- whose turn, and for what ---- */

static int is_control(uint16_t kind)
{
    return kind == PYE_FRAME_NEXT || kind == PYE_FRAME_ABORT || kind == PYE_FRAME_ACK;
}

static int is_call(uint16_t kind)
{
    return kind == PYE_FRAME_CALL || kind == PYE_FRAME_PING || kind == PYE_FRAME_ATTEST ||
           kind == PYE_FRAME_BATCH;
}

/* A message of the host whose kind is one that there is. */
static int is_of_host(uint16_t kind)
{
    return is_call(kind) || (kind >= PYE_FRAME_OCALL_RESULT && kind <= PYE_FRAME_STOP);
}

static int is_of_worker(uint16_t kind)
{
    return kind == PYE_FRAME_RESULT || kind == PYE_FRAME_ERROR || kind == PYE_FRAME_OCALL ||
           kind == PYE_FRAME_ITEM;
}

/* Whether the host, or else the worker, may begin a message of that kind now. */
static int in_turn(const pye_lane *lane, uint16_t kind, int by_host)
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
static int is_early_answer(const pye_lane *lane, uint16_t kind)
{
    return lane->host && (kind == PYE_FRAME_ERROR ||
                          (lane->writing == PYE_FRAME_OCALL_RESULT && is_of_worker(kind)));
}

/* A call that ends goes back to the ocall in which it was nested. */
static void end_call(pye_lane *lane)
{
    lane->depth--;
    lane->held = lane->depth > 0 ? PYE_FRAME_OCALL : 0;
}

/* A message that was in turn began. */
static void began(pye_lane *lane, uint16_t kind)
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
static void undo(pye_lane *lane, uint16_t kind)
{
    if (is_call(kind)) {
        end_call(lane);
    } else {
        lane->held = PYE_FRAME_OCALL; /* MORE and STOP are one frame and never dropped */
    }
}

/* ---- fragments ---- */

/* How long the fragment at `offset` of a message of `total` bytes must be. Fragments lie in the
 * slot's PLACES by turns: while the receiver copies one, the sender writes the next. */
static uint64_t fragment_length(const pye_lane *lane, uint64_t total, uint64_t offset)
{
    const uint64_t left = total - offset;

    return total <= lane->slot_size || left < lane->half ? left : lane->half;
}

/* Where in a slot the fragment is; of private numbers only. */
static size_t fragment_place(const pye_lane *lane, uint64_t total, uint64_t offset)
{
    const uint64_t which = total <= lane->slot_size ? 0 : offset / lane->half % PLACES;

    return PYE_LANE_HEADER_SIZE + (size_t)which * lane->half;
}

/* ---- sending ---- */

/* Copy `len` bytes of the message from `offset` on into the slot. */
static void gather(uint8_t *to, const pye_segment *segments, size_t num, uint64_t offset,
                   size_t len)
{
    for (size_t i = 0; i < num && len > 0; i++) {
        if (offset >= segments[i].len) {
            offset -= segments[i].len;
            continue;
        }
        const size_t from = (size_t)offset;
        size_t take = segments[i].len - from;
        take = take < len ? take : len;
        memcpy(to, segments[i].data + from, take);
        to += take;
        len -= take;
        offset = 0;
    }
}

static void publish(pye_lane *lane, uint16_t kind, uint16_t index, uint32_t length, uint64_t total,
                    uint64_t offset)
{
    uint8_t *payload = lane->out + PYE_LANE_HEADER_SIZE;

    if (total > lane->slot_size) {
        const uint64_t places = (uint64_t)PLACES * lane->half;

        if (total > lane->used) {
            lane->used = (uint32_t)(total < places ? total : places);
        }
    } else if (!is_control(kind)) {
        if (lane->used > length) { /* BND-07: nothing of an earlier message stays behind this */
            memset(payload + length, 0, lane->used - length);
        }
        lane->used = length;
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

static void publish_control(pye_lane *lane, uint16_t kind)
{
    publish(lane, kind, 0, 0, 0, 0);
}

/* ---- receiving ---- */

/* Wait until the other side's word moves on from what was last taken. */
static pye_status await_frame(pye_lane *lane, uint32_t slice_ms)
{
    uint32_t *word = word_at(lane->in, 0);
    const uint32_t seen = lane->seen;

    if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
        return PYE_OK;
    }
    if (slice_ms == 0) {
        return PYE_E_TIMEOUT;
    }
    const uint32_t cpu = (uint32_t)lane->ops.cpu() + 1; /* 0: not known */
    if (cpu != lane->cpu) {
        lane->cpu = cpu;
        __atomic_store_n(word_at(lane->mine, STATE_CPU), cpu, __ATOMIC_RELAXED);
    }
    /* A lie about the CPU or about sleeping costs the liar's own call time, nothing else. */
    const int near =
        cpu != 0 && __atomic_load_n(word_at(lane->theirs, STATE_CPU), __ATOMIC_RELAXED) == cpu;
    spin_state *spin = lane->bulk ? &lane->spin_bulk : &lane->spin;
    const uint64_t start = spin_clock();
    if (!near && spin_until_changed(spin, word, seen, start)) {
        return PYE_OK;
    }
    /* On one core sleeping is what lets the other side run: a scheduler may well pick who yields
     * again, and each such yield costs as much as the sleep. */
    for (int i = 0; i < SPIN_YIELDS && !near; i++) {
        lane->ops.yield();
        if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
            spin_learn(spin, start);
            return PYE_OK;
        }
    }
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);
    pye_status rc = PYE_OK;
    if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == seen) {
        rc = lane->ops.wait(word, seen, slice_ms);
    }
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 0, __ATOMIC_RELAXED);
    spin_learn(spin, start);
    if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
        return PYE_OK;
    }
    /* Woken to look around, or interrupted: for the caller both are the end of a slice. */
    return rc == PYE_OK ? PYE_E_TIMEOUT : rc;
}

int pye_lane_look(pye_lane *lane, uint64_t *ticks)
{
    uint32_t *word = word_at(lane->in, 0);
    const uint32_t seen = lane->seen;

    if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen) {
        return 1;
    }
    if (*ticks == 0) {
        return 0;
    }
    const uint32_t cpu = (uint32_t)lane->ops.cpu() + 1;
    if (cpu != lane->cpu) {
        lane->cpu = cpu;
        __atomic_store_n(word_at(lane->mine, STATE_CPU), cpu, __ATOMIC_RELAXED);
    }
    if (cpu != 0 && __atomic_load_n(word_at(lane->theirs, STATE_CPU), __ATOMIC_RELAXED) == cpu) {
        *ticks = 0; /* the other side runs when this one sleeps, not before */
        return 0;
    }
    const spin_state spin = {.budget = *ticks};
    const uint64_t start = spin_clock();
    const int came = spin_until_changed(&spin, word, seen, start);
    const uint64_t spent = spin_clock() - start;
    *ticks = came && spent < *ticks ? *ticks - spent : 0;
    return came;
}

int pye_lane_arm(pye_lane *lane, uint32_t **word, uint32_t *seen)
{
    *word = word_at(lane->in, 0);
    *seen = lane->seen;
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 1, __ATOMIC_SEQ_CST);
    /* Either this load sees what came, or who sends it sees that this side sleeps. */
    if (__atomic_load_n(*word, __ATOMIC_SEQ_CST) == *seen) {
        return 0;
    }
    pye_lane_disarm(lane);
    return 1;
}

void pye_lane_disarm(pye_lane *lane)
{
    __atomic_store_n(word_at(lane->mine, STATE_ASLEEP), 0, __ATOMIC_RELAXED);
}

static int is_message(const pye_lane *lane, uint16_t kind)
{
    return lane->host ? is_of_worker(kind) : is_of_host(kind);
}

static int is_ours_to_get(const pye_lane *lane, uint16_t kind)
{
    if (is_control(kind)) {
        return lane->host == (kind == PYE_FRAME_ACK);
    }
    return is_message(lane, kind);
}

/* Take one frame: each word of the header is read once, then only the copy is used (BND-03). */
static pye_status take(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms)
{
    PYE_TRY(await_frame(lane, slice_ms));
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
    lane->sequence = header.sequence;
    lane->seen = header.sequence;
    *out = header;
    return PYE_OK;
}

/* A frame that begins a message came. */
static pye_status announce(pye_lane *lane, const pye_lane_header *header)
{
    PYE_REFUSE_IF(header->offset != 0, broken(lane, "first fragment"));
    PYE_REFUSE_IF(!in_turn(lane, header->kind, !lane->host), broken(lane, "turn"));
    began(lane, header->kind);
    lane->kind = header->kind;
    lane->index = header->index;
    lane->total = header->total;
    lane->received = 0;
    lane->length = header->length;
    if (PYE_GUARD(header->total > lane->limit)) {
        /* The host may not refuse by answering: a reply this long breaks the protocol. */
        PYE_REFUSE_IF(lane->host, broken(lane, "total"));
        lane->phase = TURN;
        return PYE_E_LIMIT;
    }
    lane->phase = ANNOUNCED;
    return PYE_OK;
}

/* The host ended a message that was under way. */
static pye_status aborted(pye_lane *lane)
{
    publish_control(lane, PYE_FRAME_ACK);
    lane->phase = AWAIT;
    return PYE_E_CLOSED;
}

pye_status pye_lane_wait(pye_lane *lane, pye_lane_header *out, uint32_t slice_ms)
{
    memset(out, 0, sizeof(*out));
    if (lane->phase == ANNOUNCED) { /* an early answer, taken by pye_lane_write */
        out->sequence = lane->sequence;
        out->kind = lane->kind;
        out->index = lane->index;
        out->length = lane->length;
        out->lane = lane->number;
        out->total = lane->total;
        return PYE_OK;
    }
    PYE_REFUSE_IF(lane->phase != AWAIT, lane->phase == BROKEN ? PYE_E_PROTOCOL : PYE_E_STATE);
    PYE_TRY(take(lane, out, slice_ms));
    return announce(lane, out);
}

/* A message of so many bytes is sent: how its answer is waited for. */
static void await_bulk(pye_lane *lane, uint64_t total)
{
    const uint64_t most = (uint64_t)BULK_LONGEST * 2;
    const uint64_t moved = total > most || lane->named > most ? most : total + lane->named;

    lane->named = 0;
    lane->bulk = lane->host && moved >= BULK;
    if (lane->bulk) {
        spin_set_longest(&lane->spin_bulk, SPIN_LONGEST + (moved < most ? moved : most) / 2);
    }
}

void pye_lane_names(pye_lane *lane, uint64_t len)
{
    lane->named = len;
}

pye_status pye_lane_write(pye_lane *lane, uint16_t kind, uint16_t index,
                          const pye_segment *segments, size_t num, uint32_t slice_ms)
{
    uint64_t total = 0;

    for (size_t i = 0; i < num; i++) {
        PYE_REFUSE_IF(segments[i].len > UINT64_MAX - total, PYE_E_LENGTH);
        total += segments[i].len;
    }
    if (lane->phase == TURN) {
        PYE_REFUSE_IF(!in_turn(lane, kind, lane->host), PYE_E_STATE);
        /* Seen now or never: the worker's next answer would write over it. */
        PYE_REFUSE_IF(lane->host &&
                          __atomic_load_n(word_at(lane->in, 0), __ATOMIC_RELAXED) != lane->seen,
                      broken(lane, "sequence"));
        began(lane, kind);
        lane->writing = kind;
        lane->sent = 0;
        lane->prepared = 0;
        await_bulk(lane, total);
    } else if (PYE_GUARD(lane->phase != WRITING)) {
        return lane->phase == BROKEN ? PYE_E_PROTOCOL : PYE_E_STATE;
    }
    for (;;) {
        if (lane->phase == WRITING) {
            pye_lane_header header;

            PYE_TRY(take(lane, &header, slice_ms));
            if (header.kind == PYE_FRAME_ABORT) {
                return aborted(lane);
            }
            if (is_early_answer(lane, header.kind)) {
                return announce(lane, &header);
            }
            PYE_REFUSE_IF(header.kind != (lane->host ? PYE_FRAME_ACK : PYE_FRAME_NEXT),
                          broken(lane, "turn"));
        }
        const uint64_t offset = lane->sent;
        const uint32_t length = (uint32_t)fragment_length(lane, total, offset);
        if (!lane->prepared) {
            gather(lane->out + fragment_place(lane, total, offset), segments, num, offset, length);
        }
        lane->sent += length;
        lane->phase = lane->sent < total ? WRITING : AWAIT;
        publish(lane, kind, index, length, total, offset);
        if (lane->phase == AWAIT) {
            return PYE_OK;
        }
        /* The next place is free: its fragment was acknowledged before this one went out. */
        gather(lane->out + fragment_place(lane, total, lane->sent), segments, num, lane->sent,
               (size_t)fragment_length(lane, total, lane->sent));
        lane->prepared = 1;
    }
}

/* Copy `len` bytes that belong at `offset` of the message, which is split over head and body. */
static void scatter(uint8_t *head, size_t head_len, uint8_t *body, uint64_t offset,
                    const uint8_t *from, size_t len)
{
    if (offset < head_len) {
        const size_t room = head_len - (size_t)offset;
        const size_t take = room < len ? room : len;

        memcpy(head + offset, from, take);
        from += take;
        len -= take;
        offset += take;
    }
    if (len > 0) {
        memcpy(body + (offset - head_len), from, len);
    }
}

pye_status pye_lane_read(pye_lane *lane, uint8_t *out, size_t out_len, uint32_t slice_ms)
{
    return pye_lane_read_split(lane, NULL, 0, out, out_len, slice_ms);
}

pye_status pye_lane_read_split(pye_lane *lane, uint8_t *head, size_t head_len, uint8_t *body,
                               size_t body_len, uint32_t slice_ms)
{
    pye_status rc;

    PYE_REQUIRE(lane->phase == ANNOUNCED || lane->phase == READING,
                lane->phase == BROKEN ? PYE_E_PROTOCOL : PYE_E_STATE);
    PYE_REQUIRE(head_len <= lane->total && body_len == lane->total - head_len, PYE_E_LENGTH);
    for (;;) {
        if (lane->phase == READING) {
            pye_lane_header header;

            rc = take(lane, &header, slice_ms);
            if (rc == PYE_E_TIMEOUT) {
                return rc;
            }
            PYE_CHECK(rc);
            if (header.kind == PYE_FRAME_ABORT) {
                undo(lane, lane->kind);
                rc = aborted(lane);
                goto done;
            }
            /* BND-17: the sizes stay those that were announced. */
            if (PYE_GUARD(header.kind != lane->kind || header.index != lane->index ||
                          header.total != lane->total || header.offset != lane->received)) {
                rc = broken(lane, "fragment");
                goto done;
            }
            lane->length = header.length;
        }
        /* The payload's one read from shared memory; received + length <= total was checked. */
        scatter(head, head_len, body, lane->received,
                lane->in + fragment_place(lane, lane->total, lane->received), lane->length);
        lane->received += lane->length;
        if (lane->received == lane->total) {
            lane->phase = TURN;
            if (!lane->host) { /* before anything is done with it */
                __atomic_store_n(word_at(lane->mine, STATE_TAKEN), lane->sequence,
                                 __ATOMIC_RELEASE);
            }
            return PYE_OK;
        }
        lane->phase = READING;
        publish_control(lane, lane->host ? PYE_FRAME_NEXT : PYE_FRAME_ACK);
    }
done:
    if (head_len > 0) {
        memset(head, 0, head_len);
    }
    if (body_len > 0) {
        memset(body, 0, body_len);
    }
    return rc;
}

/* One step of a drain that has a frame to take. PYE_OK: it is the host's turn, or its wait again. */
static pye_status drop_frame(pye_lane *lane, uint32_t slice_ms)
{
    pye_lane_header header;
    const enum phase phase = lane->phase;

    if (phase == ANNOUNCED) {
        memset(&header, 0, sizeof(header));
        header.length = lane->length;
        header.total = lane->total;
    } else {
        PYE_TRY(take(lane, &header, slice_ms));
        if (phase == ABORTING) {
            PYE_REFUSE_IF(header.kind != PYE_FRAME_ACK, broken(lane, "turn"));
            if (lane->dropping) {
                undo(lane, lane->writing);
            }
            lane->phase = TURN;
            return PYE_OK;
        }
        if (header.kind == PYE_FRAME_ACK) {
            PYE_REFUSE_IF(phase != WRITING, broken(lane, "turn"));
            lane->dropping = 1;
            lane->phase = ABORTING;
            publish_control(lane, PYE_FRAME_ABORT);
            return PYE_OK;
        }
        PYE_REFUSE_IF(phase == WRITING && !is_early_answer(lane, header.kind),
                      broken(lane, "turn"));
        if (phase != READING) {
            PYE_TRY(announce(lane, &header));
        }
    }
    if (header.length == header.total - header.offset) {
        lane->phase = TURN;
        return PYE_OK;
    }
    lane->dropping = 0;
    lane->phase = ABORTING;
    publish_control(lane, PYE_FRAME_ABORT);
    return PYE_OK;
}

pye_status pye_lane_drain_to(pye_lane *lane, uint32_t depth, uint32_t slice_ms)
{
    PYE_REFUSE_IF(!lane->host, PYE_E_ARGUMENT);
    for (int i = 0; i < DRAIN_STEPS; i++) {
        PYE_REFUSE_IF(lane->phase == BROKEN, PYE_E_PROTOCOL);
        if (lane->phase != TURN) {
            PYE_TRY(drop_frame(lane, slice_ms));
        } else if (lane->depth <= depth) {
            return PYE_OK;
        } else { /* trusted code waits for an answer that nobody will give */
            lane->writing = lane->held == PYE_FRAME_ITEM ? PYE_FRAME_STOP : PYE_FRAME_OCALL_ERROR;
            began(lane, lane->writing);
            lane->phase = AWAIT;
            publish_control(lane, lane->writing);
        }
    }
    return PYE_E_TIMEOUT;
}

pye_status pye_lane_drain(pye_lane *lane, uint32_t slice_ms)
{
    return pye_lane_drain_to(lane, 0, slice_ms);
}

/* ---- notes ---- */

static int is_note_byte(uint8_t byte)
{
    return (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') ||
           (byte >= '0' && byte <= '9') || byte == '.' || byte == '_' || byte == ':' ||
           byte == '-';
}

static size_t note_length(const uint8_t *note, size_t len)
{
    size_t used = 0;

    while (used < len && is_note_byte(note[used])) {
        used++;
    }
    return used;
}

pye_status pye_lane_note_set(pye_lane *lane, const uint8_t *note, size_t len)
{
    uint8_t line[PYE_LANE_NOTE_SIZE] = {0};

    PYE_REFUSE_IF(len > sizeof(line) || note_length(note, len) != len, PYE_E_ARGUMENT);
    if (len > 0) {
        memcpy(line, note, len);
    }
    for (size_t i = 0; i < sizeof(line); i += 8) {
        uint64_t word;
        memcpy(&word, line + i, 8);
        __atomic_store_n(long_at(lane->mine, STATE_NOTE + i), word, __ATOMIC_RELAXED);
    }
    return PYE_OK;
}

size_t pye_lane_note_get(const pye_lane *lane, uint8_t out[PYE_LANE_NOTE_SIZE])
{
    size_t used;

    for (size_t i = 0; i < PYE_LANE_NOTE_SIZE; i += 8) {
        const uint64_t word =
            __atomic_load_n(long_at(lane->theirs, STATE_NOTE + i), __ATOMIC_RELAXED);
        memcpy(out + i, &word, 8);
    }
    used = note_length(out, PYE_LANE_NOTE_SIZE);
    if (PYE_GUARD(used < PYE_LANE_NOTE_SIZE && out[used] != 0)) {
        used = 0;
    }
    memset(out + used, 0, PYE_LANE_NOTE_SIZE - used);
    return used;
}
