/* lane.c - one lane of a ring: headers checked on a private copy, messages in fragments.
 * docs/formats/ring.md. Threats: BND-01 to BND-08, BND-17, BND-20. */
#include "base/check.h"
#include "call/frame.h"

#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring's words are little-endian"
#endif

_Static_assert(sizeof(pye_lane_header) == PYE_LANE_HEADER_SIZE, "docs/formats/ring.md: header");
_Static_assert(offsetof(pye_lane_header, length) == 8, "docs/formats/ring.md: header");
_Static_assert(offsetof(pye_lane_header, offset) == 24, "docs/formats/ring.md: header");

#define DRAIN_STEPS 16 /* frames that one drain takes at most: no worker keeps it for ever */
/* From so many bytes on who sends them looks for the answer as long as copying them a few times
 * takes, at 4 bytes a nanosecond: to sleep and to be woken in between costs half of that again. */
#define BULK 262144
#define BULK_LONGEST 2000000u /* ticks */

static size_t slot_stride(uint32_t slot_size)
{
    const size_t raw = (size_t)AREA + (size_t)PLACES * (slot_size / 2);

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
    lane->shorts = slot_size / SHORT_PART > SHORT_LEAST ? slot_size / SHORT_PART : SHORT_LEAST;
    lane->number = number;
    lane->phase = lane->host ? TURN : AWAIT;
    spin_init(&lane->spin);
    spin_init(&lane->spin_bulk);
    pye_copy_init(&lane->copy);
    pye_copy_init(&lane->piece);
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

uint32_t pye_index_mask(uint32_t index, uint32_t num)
{
    uint64_t mask = (uint64_t)0 - (((uint64_t)index - (uint64_t)num) >> 63);

    __asm__ volatile("" : "+r"(mask)); /* keep the compiler from making a branch of it */
    return index & (uint32_t)mask;
}

int pye_lane_taken(const pye_lane *lane, uint32_t sequence)
{
    const uint32_t taken = __atomic_load_n(word_at(lane->theirs, STATE_TAKEN), __ATOMIC_ACQUIRE);

    return (int32_t)(taken - sequence) >= 0;
}

pye_status pye_lane_refuse(pye_lane *lane, const char *check)
{
    return broken(lane, check);
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

/* Copy `len` bytes of the message from `offset` on into the slot. */
static void gather(uint8_t *to, const pye_segment *segments, size_t num, uint64_t offset,
                   size_t len, uint32_t way)
{
    for (size_t i = 0; i < num && len > 0; i++) {
        if (offset >= segments[i].len) {
            offset -= segments[i].len;
            continue;
        }
        const size_t from = (size_t)offset;
        size_t take = segments[i].len - from;
        take = take < len ? take : len;
        pye_copy_into(to, segments[i].data + from, take, way);
        to += take;
        len -= take;
        offset = 0;
    }
}

/* Put the fragment at `offset` where the next one lies. */
static void store(pye_lane *lane, const pye_segment *segments, size_t num, uint64_t offset,
                  uint32_t length)
{
    const uint32_t at = payload_at(lane, lane->out_next, lane->whole, length);
    uint32_t way = COPY_CACHED;

    if (is_long(lane, lane->whole)) {
        lane->dirty = lane->dirty_end == 0 || at < lane->dirty ? at : lane->dirty;
        lane->dirty_end = at + length > lane->dirty_end ? at + length : lane->dirty_end;
        way = lane->whole > lane->slot_size ? lane->copy.way : lane->piece.way;
    }
    lane->out_at = at;
    gather(lane->out + at, segments, num, offset, length, way);
}

/* A long message of one piece is all that the writer can time: it does not see the reader. */
static void store_piece(pye_lane *lane, const pye_segment *segments, size_t num, uint32_t length)
{
    pye_copy_choose(&lane->piece);
    pye_copy_began(&lane->piece, spin_clock());
    store(lane, segments, num, 0, length);
    pye_copy_ended(&lane->piece, spin_clock(), length, COPY_UNSEEN);
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
        lane->whole = total;
        lane->prepared = 0;
        await_bulk(lane, total);
        if (total > lane->slot_size) {
            pye_copy_choose(&lane->copy);
        }
    } else if (PYE_GUARD(lane->phase != WRITING)) {
        return lane->phase == BROKEN ? PYE_E_PROTOCOL : PYE_E_STATE;
    } else {
        /* What goes on is what began: less than was sent already would have no end. */
        PYE_REFUSE_IF(kind != lane->writing || total != lane->whole, PYE_E_STATE);
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
        if (!lane->prepared && total <= lane->slot_size && is_long(lane, total)) {
            store_piece(lane, segments, num, length);
        } else if (!lane->prepared) {
            store(lane, segments, num, offset, length);
        }
        if (offset == lane->half) { /* the reader is awake from here on */
            pye_copy_began(&lane->copy, spin_clock());
        }
        lane->sent += length;
        lane->phase = lane->sent < total ? WRITING : AWAIT;
        publish(lane, kind, index, length, total, offset);
        if (lane->phase == AWAIT) {
            if (total > lane->slot_size) {
                pye_copy_ended(&lane->copy, spin_clock(), total - lane->half, 0);
            }
            return PYE_OK;
        }
        /* The next place is free: all before the fragment that is out were acknowledged. */
        store(lane, segments, num, lane->sent,
              (uint32_t)fragment_length(lane, total, lane->sent));
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

        pye_copy_out(head + offset, from, take);
        from += take;
        len -= take;
        offset += take;
    }
    if (len > 0) {
        pye_copy_out(body + (offset - head_len), from, len);
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
        scatter(head, head_len, body, lane->received, lane->in + lane->in_at, lane->length);
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

/* ---- giving up ---- */

/* One step of a drain with a frame to take. PYE_OK: it is the host's turn, or its wait again. */
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
