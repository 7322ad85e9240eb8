/* fuzz_c_lane.c - one end of a lane, host (-DFUZZ_HOST) or worker, whose other end is the input: what
 * it writes into shared memory, between our calls and in the middle of them, and what we call.
 * Each step takes bytes from the input; docs/fuzzing.md. */
#include "fuzz_c.h"

#include "pyenclave/call.h"

#ifdef FUZZ_HOST
enum { SIDE = PYE_SIDE_HOST };
#else
enum { SIDE = PYE_SIDE_WORKER };
#endif
enum { SLOT = 96, LIMIT = 1000, STEPS = 400, STATE = 128 };
enum { POKE, FRAME, WAIT, READ, WRITE, DRAIN, ARM, NOTES, REST, OPS };

static uint8_t ring[2 * PYE_RING_PAGE] __attribute__((aligned(PYE_RING_PAGE)));
static uint8_t others[2 * PYE_RING_PAGE]; /* what the other side wrote: we may change none of it */
static fuzz_input input;
static pye_lane *lane;

#define TWICE(...) __VA_ARGS__, __VA_ARGS__
static const uint8_t kinds[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 129, 130, 131, 132, 133, 0};

static size_t slot_at(int reply)
{
    const size_t stride = 128 + 8 * SLOT;
    return PYE_RING_PAGE + PYE_LANE_STATE_SIZE + (reply ? stride : 0);
}

/* The bytes that only the other side writes are as it wrote them; all others lie within the lane. */
static void check_memory(void)
{
    const size_t states = PYE_RING_PAGE + (SIDE == PYE_SIDE_HOST ? STATE : 0);
    const size_t slot = slot_at(SIDE == PYE_SIDE_HOST);
    const size_t len = slot_at(1) - slot_at(0);

    FUZZ_CHECK(memcmp(ring + states, others + states, STATE) == 0, "the other side's state");
    FUZZ_CHECK(memcmp(ring + slot, others + slot, len) == 0, "the other side's slot");
    FUZZ_CHECK(memcmp(ring, others, PYE_RING_PAGE) == 0, "the page before the lane");
    FUZZ_CHECK(memcmp(ring + slot_at(1) + len, others + slot_at(1) + len,
                      sizeof(ring) - slot_at(1) - len) == 0,
               "what is behind the lane");
}

static void poke(size_t at, uint8_t value)
{
    ring[at] = value;
    others[at] = value;
}

static void poke_number(size_t at, uint64_t value, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        poke(at + i, (uint8_t)(value >> (8 * i)));
    }
}

/* The other side writes: anything anywhere, or a frame that is nearly right. */
static void write_peer(int op)
{
    if (op == POKE) {
        const size_t at = PYE_RING_PAGE + (size_t)fuzz_take(&input, 2) % (PYE_RING_PAGE / 4 - 8);
        poke_number(at, fuzz_number(&input), 1 + at % 8);
        return;
    }
    const size_t slot = slot_at(SIDE == PYE_SIDE_HOST);
    const uint64_t how = fuzz_take(&input, 1);
    const uint64_t kind = kinds[fuzz_take(&input, 1) % sizeof(kinds)];
    uint64_t total = 0;
    uint64_t offset = 0;
    uint64_t sequence = pye_lane_sequence(lane) + (SIDE == PYE_SIDE_WORKER);
    uint64_t index = how & 4 ? fuzz_take(&input, 1) : 0;
    uint64_t number = 0;

    if (how & 16) { /* the fragments of a long message, one after the other; some lie */
        total = (how & 1 ? LIMIT - 20 : 124) + (how & 2 ? 16 : 0);
        offset = (how >> 5) * (SLOT / 2);
    } else {
        total = how & 1 ? fuzz_number(&input) : fuzz_take(&input, 1);
        offset = how & 2 ? fuzz_number(&input) : 0;
    }
    const uint64_t left = total - offset;
    uint64_t length = total <= SLOT || left < SLOT / 2 ? left : SLOT / 2;
    if (how & 8) {
        length = fuzz_number(&input);
        sequence += fuzz_number(&input);
        number = fuzz_take(&input, 1);
    }
    poke_number(slot + 8, number << 32 | (length & 0xffffffff), 8);
    poke_number(slot + 16, total, 8);
    poke_number(slot + 24, offset, 8);
    poke_number(slot, index << 48 | kind << 32 | (sequence & 0xffffffff), 8);
}

/* In the middle of our call the other side may write on. */
static void meanwhile(void)
{
    for (int i = 0; i < 4 && input.left > 0; i++) {
        const int op = (int)fuzz_take(&input, 1) % 4;
        if (op > FRAME) {
            break;
        }
        write_peer(op);
    }
}

static pye_status wait_on(uint32_t *word, uint32_t expected, uint32_t timeout_ms)
{
    (void)word;
    (void)expected;
    (void)timeout_ms;
    meanwhile();
    return fuzz_take(&input, 1) % 2 ? PYE_OK : PYE_E_TIMEOUT;
}

static pye_status wake(uint32_t *word)
{
    FUZZ_CHECK((uint8_t *)word == ring + slot_at(0) || (uint8_t *)word == ring + slot_at(1),
               "another word is woken");
    meanwhile();
    return PYE_OK;
}

static void yield(void)
{
    meanwhile();
}

static int processor(void)
{
    return 1; /* mostly the same as what the input says of the other: no time is spent */
}

static void check_status(pye_status rc, const char *what)
{
    pye_lane_header header;
    uint8_t byte = 0;

    FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_TIMEOUT || rc == PYE_E_STATE || rc == PYE_E_PROTOCOL ||
                   rc == PYE_E_LIMIT || rc == PYE_E_CLOSED || rc == PYE_E_LENGTH,
               what);
    if (rc == PYE_E_PROTOCOL) {
        FUZZ_CHECK(pye_lane_broken(lane) != NULL, "a broken lane names no check");
        FUZZ_CHECK(pye_lane_wait(lane, &header, 0) == PYE_E_PROTOCOL, "a broken lane waits");
        FUZZ_CHECK(pye_lane_read(lane, &byte, 1, 0) == PYE_E_PROTOCOL, "a broken lane reads");
    } else {
        FUZZ_CHECK(pye_lane_broken(lane) == NULL, "a broken lane goes on");
    }
}

/* One call of ours. */
static void step(int op, uint64_t *announced)
{
    const uint32_t slice = fuzz_take(&input, 1) % 2;
    pye_lane_header header;
    pye_status rc;

    switch (op) {
    case WAIT:
        rc = pye_lane_wait(lane, &header, slice);
        check_status(rc, "wait");
        if (rc == PYE_OK) {
            FUZZ_CHECK(header.total <= LIMIT, "a total beyond the limit");
            FUZZ_CHECK(header.length <= SLOT && header.length <= header.total, "a length beyond");
            *announced = header.total;
        }
        break;
    case READ: {
        /* Exactly as large as announced; or another size, which is to be refused. */
        const uint64_t len = slice && fuzz_take(&input, 1) % 8 == 0 ? *announced + 1 : *announced;
        const size_t head = (size_t)(fuzz_take(&input, 1) % (len + 1));
        uint8_t *first = malloc(head + 1);
        uint8_t *rest = malloc((size_t)len - head + 1);
        FUZZ_CHECK(first != NULL && rest != NULL, "no memory");
        uint8_t *a = realloc(first, head ? head : 1);
        uint8_t *b = realloc(rest, len - head ? (size_t)len - head : 1);
        FUZZ_CHECK(a != NULL && b != NULL, "no memory");
        rc = pye_lane_read_split(lane, a, head, b, (size_t)len - head, slice);
        check_status(rc, "read");
        free(a);
        free(b);
        break;
    }
    case WRITE: {
        uint8_t data[LIMIT + 8];
        const uint16_t kind = kinds[fuzz_take(&input, 1) % sizeof(kinds)];
        const size_t len = (size_t)(fuzz_take(&input, 2) % sizeof(data));
        const size_t half = len / 3;
        memset(data, 0x5a, sizeof(data));
        const pye_segment parts[3] = {{data, half}, {NULL, 0}, {data + half, len - half}};
        for (int i = 0; i < 12; i++) { /* the same message again while it goes on */
            rc = pye_lane_write(lane, kind, 1, parts, 3, slice);
            check_status(rc, "write");
            if (rc != PYE_E_TIMEOUT) {
                break;
            }
            meanwhile();
        }
        break;
    }
    case DRAIN:
        rc = pye_lane_drain_to(lane, (uint32_t)fuzz_take(&input, 1) % 3, slice);
        if (SIDE == PYE_SIDE_WORKER) {
            FUZZ_CHECK(rc == PYE_E_ARGUMENT, "a worker drains");
        } else {
            check_status(rc, "drain");
        }
        break;
    case ARM: {
        uint32_t *word;
        uint32_t seen;
        uint64_t ticks = slice;
        (void)pye_lane_look(lane, &ticks);
        if (!pye_lane_arm(lane, &word, &seen)) {
            meanwhile();
            pye_lane_disarm(lane);
        }
        break;
    }
    case REST:
        pye_lane_rest(lane);
        break;
    default: {
        uint8_t note[PYE_LANE_NOTE_SIZE];
        const size_t len = pye_lane_note_get(lane, note);
        FUZZ_CHECK(len <= sizeof(note), "a note beyond its line");
        if (SIDE == PYE_SIDE_HOST) {
            FUZZ_CHECK(pye_lane_note_set(lane, note, len) == PYE_OK, "its own kind of note");
        }
        (void)pye_lane_taken(lane, pye_lane_sequence(lane));
        (void)pye_lane_peer_asleep(lane);
        break;
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const pye_wait_ops ops = {wait_on, wake, yield, processor};
    uint64_t announced = 0;

    memset(ring, 0, sizeof(ring));
    memset(others, 0, sizeof(others));
    input = (fuzz_input){data, size};
    FUZZ_CHECK(pye_lane_new(&lane, ring, sizeof(ring), 1, SLOT, 0, SIDE, LIMIT, &ops) == PYE_OK,
               "no lane");
    poke_number(PYE_RING_PAGE + (SIDE == PYE_SIDE_HOST ? STATE : 0) + 4, 2, 4); /* near */
    for (int i = 0; i < STEPS && input.left > 0; i++) {
        const int op = (int)fuzz_take(&input, 1) % OPS;
        if (op <= FRAME) {
            write_peer(op);
        } else {
            step(op, &announced);
        }
        check_memory();
    }
    pye_lane_free(lane);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* how 0: a small frame of that kind; 16 + 32 n: fragment n of a long one; + 2: that lies. */
    static const uint8_t seeds[][88] = {
#ifdef FUZZ_HOST
        {WRITE, 0, 0, 10, 0, FRAME, 0, 10, 20, WAIT, 0, READ, 0, 5, WRITE, 0, 0, 9, 0},
        {WRITE, 0, 0, 200, 0, FRAME, 0, 12, 0, WRITE, 0, 0, 200, 0, FRAME, 0, 12, 0},
        {WRITE, 0, 0, 4, 0, FRAME, 16, 10, WAIT, 0, READ, 0, 9, FRAME, 48, 10, READ, 0, 9,
         FRAME, 80, 10, READ, 0, 9},
        {WRITE, 0, 0, 4, 0, FRAME, 0, 13, 8, WAIT, 0, READ, 0, 1, WRITE, 0, 6, 3, 0, FRAME, 0, 10,
         2, WAIT, 0, READ, 0, 1},
        {WRITE, 0, 0, 4, 0, FRAME, 0, 14, 8, WAIT, 0, READ, 0, 1, WRITE, 0, 8, 0, 0, FRAME, 0, 14,
         2, WAIT, 0, READ, 0, 1, DRAIN, 0, 0},
        {WRITE, 0, 0, 200, 0, DRAIN, 0, 0, FRAME, 0, 12, 0, DRAIN, 0, 0, FRAME, 0, 12, 0, DRAIN},
        {WRITE, 0, 0, 4, 0, FRAME, 16, 10, WAIT, 0, READ, 0, 9, FRAME, 48, 10, READ, 0, 9,
         FRAME, 82, 10, READ, 0, 9},
        {WRITE, 0, 5, 64, 0, WAIT, 1, FRAME, 0, 10, 64, 3, 1, READ, 1, 0, 0, NOTES, 0, ARM, 1},
        /* a long message that does not get on, and another one */
        {WRITE, 0, 0, 200, 0, TWICE(TWICE(TWICE(2, 2, 2, 2))), 2, 2, WRITE, 0, 0, 9, 0, 0, 9, 0},
#else
        {FRAME, 0, 0, 20, WAIT, 0, READ, 0, 5, WRITE, 0, 10, 9, 0, FRAME, 0, 0, 5, WAIT, 0},
        {FRAME, 16, 0, WAIT, 0, READ, 0, 9, FRAME, 48, 0, READ, 0, 9, FRAME, 80, 0, READ, 0, 9,
         FRAME, 112, 0, READ, 0, 9},
        {FRAME, 0, 0, 4, WAIT, 0, READ, 0, 1, WRITE, 0, 10, 200, 0, FRAME, 0, 3, 0, FRAME, 0, 3, 0,
         FRAME, 0, 3, 0},
        {FRAME, 0, 0, 4, WAIT, 0, READ, 0, 1, WRITE, 0, 13, 3, 0, FRAME, 0, 6, 8, WAIT, 0, READ, 0,
         1, WRITE, 0, 10, 3, 0},
        {FRAME, 0, 0, 4, WAIT, 0, READ, 0, 1, WRITE, 0, 14, 3, 0, FRAME, 0, 8, 0, WAIT, 0, READ, 0,
         1, WRITE, 0, 14, 3, 0, FRAME, 0, 9, 0},
        {FRAME, 16, 0, WAIT, 0, READ, 0, 9, FRAME, 0, 4, 0, READ, 0, 9, WAIT, 0, FRAME, 0, 0, 3},
        {FRAME, 16, 0, WAIT, 0, READ, 0, 9, FRAME, 48, 0, READ, 0, 9, FRAME, 82, 0, READ, 0, 9},
        {WAIT, 1, FRAME, 0, 5, 64, 3, 1, READ, 1, 0, 0, NOTES, 0, ARM, 1, WRITE, 1, 11, 7, 0},
#endif
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
