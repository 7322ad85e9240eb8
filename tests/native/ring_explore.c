/* ring_explore.c - what the two ends of a lane do with each other in every order (ring_machine.h),
 * and what must hold. usage: ring_explore STATES [CASE...]; STATES bounds each case, 0: no bound. */
#include "ring_machine.h"

#include "pyenclave/call.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLICE = 100, INDEX = 3 };
/* What a call asks of the worker, in the low bits of its first word. */
enum { ECHO, FAIL, OCALL, NEST, STREAM, WAITS_LONG };
/* Plans: bits of ring_case.plan. */
enum { GIVES_UP = 1, ASKS = 2, STOPS = 4 };

#define WORD(id, what, words) ((uint64_t)(id) << 32 | (uint64_t)(words) << 8 | (uint64_t)(what))

static uint64_t answer_word(uint64_t first, size_t at)
{
    return ~(first + at * 0x100000000000u);
}

static uint64_t request_word(uint64_t first, size_t at)
{
    return first + at * 0x10000000000u;
}

static void check(int holds, const char *what)
{
    if (!holds) {
        ring_violation("%s", what);
    }
}

/* With a hostile writer any status may come, but after a broken protocol no other any more. */
static int is_over(pye_status rc)
{
    pye_lane_header header;
    uint64_t word = 0;
    const pye_segment segment = {(const uint8_t *)&word, sizeof(word)};
    pye_lane *lane = ring_lane();

    if (rc == PYE_OK) {
        return 0;
    }
    check(rc == PYE_E_PROTOCOL || current->writes > 0 || rc == PYE_E_CLOSED || rc == PYE_E_LIMIT,
          "a status that nothing explains");
    if (rc == PYE_E_PROTOCOL) {
        check(current->writes > 0, pye_lane_broken(lane));
        check(pye_lane_broken(lane) != NULL, "a broken lane names no check");
        check(pye_lane_wait(lane, &header, SLICE) == PYE_E_PROTOCOL &&
                  pye_lane_read(lane, (uint8_t *)&word, sizeof(word), SLICE) == PYE_E_PROTOCOL &&
                  pye_lane_write(lane, PYE_FRAME_CALL, 0, &segment, 1, SLICE) == PYE_E_PROTOCOL,
              "a broken lane did not stay broken");
    }
    return 1;
}

/* ---- one message, whatever it takes ---- */

static pye_status send_words(uint16_t kind, uint64_t (*word)(uint64_t, size_t), uint64_t first,
                             size_t words, uint32_t label)
{
    uint64_t data[RING_LIMIT / 8 + 8];
    pye_status rc;

    for (size_t i = 0; i < words; i++) {
        data[i] = word(first, i);
    }
    const pye_segment segment = {(const uint8_t *)data, words * 8};
    app.local[ring_self()][6] = (uint32_t)first << 8 | (uint32_t)kind;
    app.local[ring_self()][7] = (uint32_t)words << 8 | (uint32_t)(first >> 32);
    do {
        ring_settle(label);
        rc = pye_lane_write(ring_lane(), kind, words > 0 ? INDEX : 0, &segment, 1, SLICE);
    } while (rc == PYE_E_TIMEOUT && !(ring_self() == HOST && (ring_killed() ||
                                                             (current->plan & GIVES_UP))));
    return rc;
}

static pye_status await_message(pye_lane_header *header, uint32_t label)
{
    pye_status rc;

    do {
        ring_settle(label);
        rc = pye_lane_wait(ring_lane(), header, SLICE);
    } while (rc == PYE_E_TIMEOUT && !(ring_self() == HOST && (ring_killed() ||
                                                             (current->plan & GIVES_UP))));
    return rc;
}

static pye_status read_words(const pye_lane_header *header, uint32_t label)
{
    uint64_t *data = app.data[ring_self()];
    pye_status rc;

    check(header->total <= current->limit[ring_self()], "longer than the limit");
    memset(data, 0, sizeof(app.data[0]));
    app.local[ring_self()][5] = (uint32_t)header->total << 16 | header->kind;
    do {
        ring_settle(label);
        ring_expect(data, (size_t)header->total);
        rc = pye_lane_read(ring_lane(), (uint8_t *)data, (size_t)header->total, SLICE);
    } while (rc == PYE_E_TIMEOUT && !(ring_self() == HOST && (ring_killed() ||
                                                             (current->plan & GIVES_UP))));
    return rc;
}

/* ---- the worker ---- */

static uint32_t label_of(uint32_t step)
{
    return 100 + 50 * pye_lane_depth(ring_lane()) + step;
}

static int serve(const pye_lane_header *header);

/* Wait for the host's next message while a call is under way, and take it. */
static pye_status next_message(pye_lane_header *header, uint32_t step)
{
    pye_status rc = await_message(header, label_of(step));

    if (rc == PYE_OK) {
        rc = read_words(header, label_of(step + 1));
    }
    return rc;
}

/* Whether the worker goes on with its call: the answer to what it sent was for it. */
static int ask_host(uint64_t first)
{
    pye_lane_header header;
    pye_status rc = send_words(PYE_FRAME_OCALL, request_word, first, 2, label_of(10));

    if (rc != PYE_E_CLOSED && is_over(rc)) {
        return 0;
    }
    for (;;) {
        rc = next_message(&header, 12);
        if (is_over(rc)) {
            return 0;
        }
        if (header.kind != PYE_FRAME_CALL) {
            break;
        }
        if (!serve(&header)) { /* nested */
            return 0;
        }
    }
    if (current->writes == 0 && header.kind == PYE_FRAME_OCALL_RESULT) {
        check(app.data[WORKER][0] == answer_word(first, 0), "the ocall's answer is another's");
    }
    return 1;
}

static int give_items(uint64_t first)
{
    pye_lane_header header;
    pye_status rc;

    for (uint32_t item = 0; item < 2; item++) {
        app.local[WORKER][4] = item;
        rc = send_words(PYE_FRAME_ITEM, answer_word, first + item, 1, label_of(20));
        if (rc != PYE_E_CLOSED && is_over(rc)) {
            return 0;
        }
        rc = next_message(&header, 22);
        if (is_over(rc)) {
            return 0;
        }
        if (header.kind == PYE_FRAME_STOP) {
            break;
        }
    }
    return 1;
}

/* A call whose payload was read. Returns 0 when the worker ends. */
static int serve(const pye_lane_header *header)
{
    const uint64_t first = app.data[WORKER][0];
    const uint32_t id = (uint32_t)(first >> 32) % 8;
    const uint32_t what = first & 0xff;
    size_t words = (size_t)(first >> 8 & 0xff) % (RING_LIMIT / 8);
    uint16_t kind = PYE_FRAME_RESULT;

    app.begun[id]++;
    if (current->writes == 0) {
        check(header->index == (header->total > 0 ? INDEX : 0), "another index");
        for (size_t i = 0; i < header->total / 8; i++) {
            check(app.data[WORKER][i] == request_word(first, i), "a request that was not sent");
        }
        check(app.begun[id] == 1, "a call came twice");
    }
    app.local[WORKER][pye_lane_depth(ring_lane()) % 4] = (uint32_t)first;
    ring_step();
    if ((what == OCALL || what == NEST) && !ask_host(first)) {
        return 0;
    }
    if (what == STREAM) {
        if (!give_items(first)) {
            return 0;
        }
        words = 0;
    }
    if (what == FAIL) {
        kind = PYE_FRAME_ERROR;
    }
    const pye_status rc = send_words(kind, answer_word, first, words, label_of(30));
    return rc == PYE_E_CLOSED || !is_over(rc);
}

static void worker(void)
{
    for (;;) {
        pye_lane_header header;
        pye_status rc;

        memset(app.local[WORKER], 0, sizeof(app.local[WORKER]));
        rc = await_message(&header, 1);
        if (rc == PYE_E_LIMIT) { /* longer than it may be: an answer all the same */
            rc = send_words(PYE_FRAME_ERROR, answer_word, 0, 1, 2);
            if (is_over(rc)) {
                return;
            }
            continue;
        }
        if (rc == PYE_E_CLOSED) {
            continue;
        }
        if (is_over(rc)) {
            return;
        }
        rc = read_words(&header, 3);
        if (rc == PYE_E_CLOSED) {
            continue;
        }
        if (is_over(rc) || !serve(&header)) {
            return;
        }
    }
}

/* ---- the host ---- */

/* The caller gave up, or the worker is dead. */
static void give_up(uint32_t id, uint32_t sequence, int sent)
{
    pye_status rc;

    if (ring_killed()) {
        ring_reaped();
        if (app.begun[id] > 0) {
            check(sent && pye_lane_taken(ring_lane(), sequence),
                  "a call began, and the host is told that it did not");
        }
        return;
    }
    do {
        ring_settle(90);
        rc = pye_lane_drain(ring_lane(), SLICE);
    } while (rc == PYE_E_TIMEOUT);
    check(rc == PYE_OK || current->writes > 0, "a lane that cannot be drained");
    check(rc != PYE_OK || pye_lane_idle(ring_lane()), "a drained lane is not idle");
}

/* Answer what came while the call was under way. Returns whether the call's answer is next. */
static pye_status answer_in_between(const pye_lane_header *header, uint64_t first)
{
    const uint32_t what = first & 0xff;

    if (header->kind == PYE_FRAME_OCALL) {
        if (what == NEST) {
            pye_lane_header nested;
            const uint64_t inner = WORD((first >> 32) + 1, ECHO, 1);
            pye_status rc = send_words(PYE_FRAME_CALL, request_word, inner, 1, 60);

            rc = rc == PYE_OK ? await_message(&nested, 61) : rc;
            rc = rc == PYE_OK ? read_words(&nested, 62) : rc;
            if (rc != PYE_OK) {
                return rc;
            }
            if (current->writes == 0) {
                check(nested.kind == PYE_FRAME_RESULT &&
                          app.data[HOST][0] == answer_word(inner, 0),
                      "a nested call's answer is another's");
            }
        }
        return send_words(PYE_FRAME_OCALL_RESULT, answer_word, first, 1, 63);
    }
    app.local[HOST][4]++;
    return send_words(current->plan & STOPS ? PYE_FRAME_STOP : PYE_FRAME_MORE, answer_word, first, 0,
                      64);
}

/* One call with everything that belongs to it. Returns 0 when the host ends. */
static int call(uint32_t id, int what, size_t words, size_t answer)
{
    const uint64_t first = WORD(id, what, answer);
    pye_lane *lane = ring_lane();
    pye_lane_header header;
    uint32_t sequence = 0;
    int sent = 0;
    pye_status rc;

    memset(app.local[HOST], 0, sizeof(app.local[HOST]));
    app.local[HOST][0] = id;
    rc = send_words(PYE_FRAME_CALL, request_word, first, words, 50);
    if (rc == PYE_OK) {
        sequence = pye_lane_sequence(lane);
        sent = 1;
    }
    while (rc == PYE_OK) {
        rc = await_message(&header, 51);
        if (rc != PYE_OK) {
            break;
        }
        rc = read_words(&header, 52);
        if (rc != PYE_OK || pye_lane_depth(lane) == 0) {
            break;
        }
        rc = answer_in_between(&header, first);
    }
    if (rc == PYE_E_TIMEOUT) {
        give_up(id, sequence, sent);
        return !ring_killed() && pye_lane_broken(lane) == NULL;
    }
    if (is_over(rc)) {
        return 0;
    }
    if (current->writes == 0 && words * 8 <= current->limit[WORKER]) {
        check(header.kind == (what == FAIL ? PYE_FRAME_ERROR : PYE_FRAME_RESULT), "another kind");
        check(what == STREAM || header.total == answer * 8, "an answer of another length");
        for (size_t i = 0; i < header.total / 8; i++) {
            check(app.data[HOST][i] == answer_word(first, i), "the answer is that of another call");
        }
        check(app.begun[id] == 1, "an answer to a call that did not begin once");
    }
    app.answered[id]++;
    return 1;
}

static void host_two(void)
{
    if (call(1, ECHO, 2, 2)) {
        (void)call(2, FAIL, 1, 1);
    }
    app.ended[HOST] = 1;
}

static void host_three(void)
{
    for (uint32_t id = 1; id <= 3 && call(id, ECHO, 4 - id, id); id++) {
    }
    app.ended[HOST] = 1;
}

static void host_long(void)
{
    /* Three fragments there, five back: more than the area has room for. */
    if (call(1, ECHO, 15, 30)) {
        (void)call(2, ECHO, 1, 1);
    }
    app.ended[HOST] = 1;
}

/* Long messages of one piece, short ones and fragments, each where another kind lay before. */
static void host_pieces(void)
{
    if (call(1, ECHO, 10, 12) && call(2, ECHO, 8, 1) && call(3, ECHO, 12, 15)) {
        (void)call(4, ECHO, 9, 9);
    }
    app.ended[HOST] = 1;
}

/* What is given up may have been stored ahead: both sides still agree where the next one lies. */
static void host_long_then_piece(void)
{
    if (call(1, ECHO, 15, 15)) {
        (void)call(2, ECHO, 10, 10);
    }
    app.ended[HOST] = 1;
}

static void host_there_and_back(void)
{
    (void)call(1, ECHO, 15, 15);
    app.ended[HOST] = 1;
}

static void host_back(void)
{
    (void)call(1, ECHO, 1, 15);
    app.ended[HOST] = 1;
}

static void host_long_there(void)
{
    if (call(1, ECHO, 30, 2)) {
        (void)call(2, ECHO, 1, 1);
    }
    app.ended[HOST] = 1;
}

static void host_too_long(void)
{
    if (call(1, ECHO, 15, 1)) {
        (void)call(2, ECHO, 1, 1);
    }
    app.ended[HOST] = 1;
}

static void host_ocall(void)
{
    if (call(1, OCALL, 1, 1)) {
        (void)call(2, ECHO, 1, 1);
    }
    app.ended[HOST] = 1;
}

static void host_nested(void)
{
    (void)call(1, NEST, 1, 1);
    app.ended[HOST] = 1;
}

static void host_stream(void)
{
    if (call(1, STREAM, 1, 1)) {
        (void)call(2, ECHO, 1, 1);
    }
    app.ended[HOST] = 1;
}

/* A host that may not block: looks, tells that it sleeps, and sleeps on the word elsewhere. */
static void host_async(void)
{
    pye_lane *lane = ring_lane();

    for (uint32_t id = 1; id <= 2; id++) {
        const uint64_t first = WORD(id, ECHO, 1);
        const uint64_t word = request_word(first, 0);
        const pye_segment segment = {(const uint8_t *)&word, sizeof(word)};
        pye_lane_header header;
        pye_status rc;

        app.local[HOST][0] = id;
        ring_settle(70);
        check(pye_lane_write(lane, PYE_FRAME_CALL, INDEX, &segment, 1, 0) == PYE_OK, "no turn");
        for (;;) {
            uint64_t budget = PYE_LANE_TICKS;
            uint32_t *at;
            uint32_t seen;

            ring_settle(71);
            rc = pye_lane_wait(lane, &header, 0);
            if (rc != PYE_E_TIMEOUT || pye_lane_look(lane, &budget)) {
                if (rc == PYE_OK) {
                    break;
                }
                check(rc == PYE_E_TIMEOUT, "a status that nothing explains");
                continue;
            }
            if (!pye_lane_arm(lane, &at, &seen)) {
                (void)ring_sleep(at, seen);
                pye_lane_disarm(lane);
            }
        }
        app.local[HOST][5] = (uint32_t)header.total;
        ring_settle(72);
        ring_expect(app.data[HOST], sizeof(word));
        check(pye_lane_read(lane, (uint8_t *)app.data[HOST], sizeof(word), 0) == PYE_OK &&
                  app.data[HOST][0] == answer_word(first, 0),
              "the answer is that of another call");
        app.answered[id]++;
    }
    app.ended[HOST] = 1;
}

#define LIMITS .limit = {RING_LIMIT, RING_LIMIT}
static const ring_case cases[] = {
    /* Without timeouts: whoever sleeps is woken, or sleeps for ever. */
    {"calls", {host_three, worker}, {1, 2}, LIMITS},
    {"calls-near", {host_three, worker}, {1, 1}, LIMITS},
    {"calls-unknown", {host_two, worker}, {-1, -1}, LIMITS},
    {"async", {host_async, worker}, {1, 2}, LIMITS},
    {"async-near", {host_async, worker}, {1, 1}, LIMITS},
    {"fragments-back", {host_long, worker}, {1, 1}, LIMITS},
    {"fragments", {host_long, worker}, {1, 2}, LIMITS},
    {"fragments-there", {host_long_there, worker}, {1, 2}, LIMITS},
    {"pieces", {host_pieces, worker}, {1, 1}, LIMITS},
    {"ocall", {host_ocall, worker}, {1, 2}, LIMITS},
    {"nested", {host_nested, worker}, {1, 1}, LIMITS},
    {"stream", {host_stream, worker}, {1, 2}, LIMITS},
    {"stream-stopped", {host_stream, worker}, {1, 1}, LIMITS, .plan = STOPS},
    {"too-long", {host_too_long, worker}, {1, 2}, .limit = {RING_LIMIT, 64}},
    /* Slices that end at any moment. */
    {"slices", {host_two, worker}, {1, 1}, LIMITS, .timeouts = 3},
    {"slices-fragments", {host_long, worker}, {1, 1}, LIMITS, .timeouts = 2},
    /* A caller that gives up at any moment, and the next call. */
    {"given-up", {host_two, worker}, {1, 1}, LIMITS, .timeouts = 2, .plan = GIVES_UP},
    {"given-up-fragments", {host_long, worker}, {1, 1}, LIMITS, .timeouts = 2, .plan = GIVES_UP},
    {"given-up-piece", {host_long_then_piece, worker}, {1, 1}, LIMITS, .timeouts = 2,
     .plan = GIVES_UP},
    {"given-up-ocall", {host_ocall, worker}, {1, 1}, LIMITS, .timeouts = 2, .plan = GIVES_UP},
    {"given-up-stream", {host_stream, worker}, {1, 1}, LIMITS, .timeouts = 2, .plan = GIVES_UP},
    {"given-up-too-long", {host_too_long, worker}, {1, 1}, .limit = {RING_LIMIT, 64},
     .timeouts = 2, .plan = GIVES_UP},
    /* A worker that dies at any moment. */
    {"killed", {host_two, worker}, {1, 2}, LIMITS, .kills = 1},
    {"killed-fragments", {host_long, worker}, {1, 1}, LIMITS, .kills = 1},
    {"killed-ocall", {host_ocall, worker}, {1, 1}, LIMITS, .kills = 1},
    /* Somebody who changes headers and states at any moment. */
    {"hostile", {host_two, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-back", {host_back, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-fragments", {host_there_and_back, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-pieces", {host_pieces, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-ocall", {host_ocall, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-stream", {host_stream, worker}, {1, 1}, LIMITS, .writes = 1},
    {"hostile-given-up", {host_there_and_back, worker}, {1, 1}, LIMITS, .timeouts = 1, .writes = 1,
     .plan = GIVES_UP},
    {"hostile-twice", {host_two, worker}, {1, 1}, LIMITS, .writes = 2},
};

int main(int argc, char **argv)
{
    const uint64_t most = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    uint64_t states = 0;
    int found = 0;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int wanted = argc <= 2;

        for (int k = 2; k < argc; k++) {
            wanted |= strcmp(argv[k], cases[i].name) == 0;
        }
        if (!wanted) {
            continue;
        }
        const ring_result got = ring_explore(&cases[i], most ? most : UINT64_MAX);
        printf("%-20s %10llu states %11llu runs %9llu ends%s\n", cases[i].name,
               (unsigned long long)got.states, (unsigned long long)got.runs,
               (unsigned long long)got.ends, got.complete ? "" : " (bounded)");
        fflush(stdout);
        states += got.states;
        found++;
    }
    printf("%d cases, %llu states\n", found, (unsigned long long)states);
    return found == 0;
}
