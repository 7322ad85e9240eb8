/* ring_threads.c - both ends of a lane as two threads of one process, as fast as they can, and a third
 * that changes every shared word meanwhile. For ThreadSanitizer, without the third, and for ASan.
 * usage: ring_threads CALLS SEED [flip]
 *
 * Without a flipper each answer must be right. With one (BND-03) a call may end in any way that
 * call.h names, and then both lanes are made anew; what may not happen is for the sanitizers to see,
 * which have buffers of exactly the announced size, and a broken lane that goes on. */
#define _GNU_SOURCE
#include "pyenclave/batch.h"
#include "pyenclave/call.h"
#include "pyenclave/linux.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 256, LIMIT = 4096, SLICE = 2, GUARD = 4096, INDEX = 5, LONGEST = 12 * SLOT };
enum { ECHO, ASK, ITEMS, FAIL, KINDS };

static uint8_t *whole;
static uint8_t *memory;
static size_t memory_len;
static pye_lane *lanes[2];
static int flips;
static int over; /* the round is */
static struct {
    uint64_t right, wrong, refused, late, broken, rounds, flipped;
} count;

static void fail(const char *what)
{
    printf("FAILED: %s\n", what);
    fflush(stdout);
    _exit(1);
}

static uint32_t next(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static int stopped(void)
{
    return __atomic_load_n(&over, __ATOMIC_ACQUIRE);
}

static int processor(void)
{
    return sched_getcpu();
}

static const pye_wait_ops ops = {pye_wait_futex, pye_wake_futex, pye_wait_yield, processor};

/* Whether a side may go on; and that one which may not never does again. */
static int good(pye_lane *lane, pye_status rc)
{
    pye_lane_header header;

    if (rc == PYE_OK) {
        return 1;
    }
    if (!flips) {
        printf("status %d, %s\n", (int)rc, pye_lane_broken(lane) ? pye_lane_broken(lane) : "-");
        fail("a call that nobody disturbed");
    }
    if (rc != PYE_E_PROTOCOL && rc != PYE_E_TIMEOUT && rc != PYE_E_LIMIT && rc != PYE_E_CLOSED &&
        rc != PYE_E_STATE) {
        fail("a status that call.h does not name");
    }
    if (rc == PYE_E_PROTOCOL && (pye_lane_broken(lane) == NULL ||
                                 pye_lane_wait(lane, &header, 0) != PYE_E_PROTOCOL)) {
        fail("a broken lane goes on");
    }
    return 0;
}

/* ---- a message ---- */

static pye_status put(pye_lane *lane, uint16_t kind, const uint8_t *data, size_t len, int *tries)
{
    const size_t half = len / 2;
    const pye_segment segments[2] = {{data, half}, {data + half, len - half}};
    pye_status rc;

    do {
        rc = pye_lane_write(lane, kind, kind == PYE_FRAME_MORE ? 0 : INDEX, segments, 2, SLICE);
    } while (rc == PYE_E_TIMEOUT && --*tries > 0 && !stopped());
    return rc;
}

/* The caller frees `data`. */
static pye_status get(pye_lane *lane, pye_lane_header *header, uint8_t **data, int *tries)
{
    pye_status rc;

    *data = NULL;
    do {
        rc = pye_lane_wait(lane, header, SLICE);
    } while (rc == PYE_E_TIMEOUT && --*tries > 0 && !stopped());
    if (rc != PYE_OK) {
        return rc;
    }
    if (header->total > LIMIT || header->length > SLOT) {
        fail("a header beyond the limits was given out");
    }
    *data = malloc(header->total ? (size_t)header->total : 1);
    if (*data == NULL) {
        fail("no memory");
    }
    do {
        rc = pye_lane_read(lane, *data, (size_t)header->total, SLICE);
    } while (rc == PYE_E_TIMEOUT && --*tries > 0 && !stopped());
    return rc;
}

/* ---- the worker ---- */

static pye_status native(const uint8_t *in, size_t in_len, uint8_t *out, size_t *out_len)
{
    if (in_len == 0 || in_len > *out_len) {
        return PYE_E_ARGUMENT;
    }
    for (size_t i = 0; i < in_len; i++) {
        out[i] = (uint8_t)~in[i];
    }
    *out_len = in_len;
    return PYE_OK;
}

static void forget(uint8_t *at, size_t len)
{
    memset(at, 0, len);
}

static pye_status answer_batch(pye_lane *lane, const uint8_t *data, size_t len, int *tries)
{
    static uint8_t arena[LIMIT] __attribute__((aligned(64)));
    const uint8_t *reply;
    size_t reply_len;
    size_t used;
    void *function;
    pye_status (*const call)(const uint8_t *, size_t, uint8_t *, size_t *) = native;

    memcpy(&function, &call, sizeof(function));
    if (pye_batch_native(function, &reply, &reply_len, &used, arena, sizeof(arena), data, len,
                         forget) != PYE_OK) {
        return put(lane, PYE_FRAME_ERROR, data, 0, tries);
    }
    return put(lane, PYE_FRAME_RESULT, reply, reply_len, tries);
}

static pye_status serve(pye_lane *lane, uint8_t *data, size_t len, int *tries)
{
    pye_lane_header header;
    uint8_t *more = NULL;
    pye_status rc = PYE_OK;
    const int what = len > 0 ? data[0] % KINDS : ECHO;

    for (int i = 0; rc == PYE_OK && i < (what == ITEMS ? 3 : what == ASK); i++) {
        rc = put(lane, what == ASK ? PYE_FRAME_OCALL : PYE_FRAME_ITEM, data, len / 2, tries);
        if (rc == PYE_OK) {
            rc = get(lane, &header, &more, tries);
            free(more);
        }
    }
    for (size_t i = 0; i < len; i++) {
        data[i] = (uint8_t)~data[i];
    }
    return rc != PYE_OK ? rc
                        : put(lane, what == FAIL ? PYE_FRAME_ERROR : PYE_FRAME_RESULT, data, len,
                              tries);
}

static void *worker(void *unused)
{
    pye_lane *lane = lanes[1];

    (void)unused;
    while (!stopped()) {
        pye_lane_header header;
        uint8_t *data;
        int tries = flips ? 20 : 1 << 20;
        pye_status rc = get(lane, &header, &data, &tries);

        if (rc == PYE_OK && header.kind == PYE_FRAME_BATCH) {
            rc = answer_batch(lane, data, (size_t)header.total, &tries);
        } else if (rc == PYE_OK) {
            rc = serve(lane, data, (size_t)header.total, &tries);
        }
        free(data);
        if (rc != PYE_E_TIMEOUT && rc != PYE_E_CLOSED && !good(lane, rc)) {
            break;
        }
    }
    return NULL;
}

/* ---- the host ---- */

static int is_right(const uint8_t *sent, size_t sent_len, const uint8_t *got, size_t got_len)
{
    int same = sent_len == got_len;

    for (size_t i = 0; same && i < sent_len; i++) {
        same = got[i] == (uint8_t)(sent[i] ^ 0xffu);
    }
    return same;
}

static pye_status call(pye_lane *lane, uint64_t *random, int *right)
{
    uint8_t data[LONGEST];
    uint8_t *got = NULL;
    pye_lane_header header;
    int tries = flips ? 3 : 1 << 20;
    const size_t len = next(random) % 4 ? next(random) % 64 : next(random) % LONGEST;

    for (size_t i = 0; i < len; i++) {
        data[i] = (uint8_t)next(random);
    }
    pye_status rc = put(lane, PYE_FRAME_CALL, data, len, &tries);
    while (rc == PYE_OK) {
        free(got);
        rc = get(lane, &header, &got, &tries);
        if (rc != PYE_OK || pye_lane_depth(lane) == 0) {
            break;
        }
        rc = put(lane, header.kind == PYE_FRAME_OCALL ? PYE_FRAME_OCALL_RESULT : PYE_FRAME_MORE,
                 data, header.kind == PYE_FRAME_OCALL ? len : 0, &tries);
    }
    *right = rc == PYE_OK && is_right(data, len, got, (size_t)header.total);
    free(got);
    return rc;
}

static pye_status call_batch(pye_lane *lane, uint64_t *random, int *right)
{
    uint8_t data[PYE_BATCH_HEADER_SIZE + 8 * 64] __attribute__((aligned(64))) = {0};
    uint8_t *got = NULL;
    pye_lane_header header;
    pye_batch batch;
    const uint8_t *item;
    size_t item_len;
    uint32_t tag;
    int tries = flips ? 3 : 1 << 20;
    const uint32_t num = 1 + next(random) % 8;

    pye_batch_head(data, PYE_BATCH_EVEN, num, 64, 0);
    for (size_t i = 0; i < num * 64; i++) {
        data[PYE_BATCH_HEADER_SIZE + i] = (uint8_t)next(random);
    }
    *right = 0;
    pye_status rc = put(lane, PYE_FRAME_BATCH, data, PYE_BATCH_HEADER_SIZE + num * 64, &tries);
    if (rc == PYE_OK) {
        rc = get(lane, &header, &got, &tries);
    }
    if (rc == PYE_OK && header.kind == PYE_FRAME_RESULT &&
        pye_batch_open(&batch, got, (size_t)header.total, 64, 1) == PYE_OK) {
        *right = batch.count == num;
        for (uint32_t i = 0; pye_batch_next(&batch, &item, &item_len, &tag); i++) {
            *right = *right && tag == PYE_BATCH_ITEM && i < num &&
                     is_right(data + PYE_BATCH_HEADER_SIZE + i * 64, 64, item, item_len);
        }
    }
    free(got);
    return rc;
}

static uint64_t calls_left;

static void *host(void *seed)
{
    pye_lane *lane = lanes[0];
    uint64_t *random = seed;

    while (calls_left > 0 && !stopped()) {
        int right;

        calls_left--;
        if (next(random) % 256 == 0) { /* so that both sides sleep now and then */
            const struct timespec pause = {0, 20000};
            (void)nanosleep(&pause, NULL);
        }
        const pye_status rc = next(random) % 8 ? call(lane, random, &right)
                                               : call_batch(lane, random, &right);
        if (rc == PYE_E_TIMEOUT) {
            int tries = 10;
            count.late++;
            while (pye_lane_drain(lane, SLICE) == PYE_E_TIMEOUT && --tries > 0) {
            }
            if (!pye_lane_idle(lane)) {
                break;
            }
            continue;
        }
        if (!good(lane, rc)) {
            count.broken += rc == PYE_E_PROTOCOL;
            count.refused += rc != PYE_E_PROTOCOL;
            break;
        }
        if (!flips && !right) {
            fail("a wrong answer");
        }
        count.right += right != 0;
        count.wrong += right == 0;
    }
    __atomic_store_n(&over, 1, __ATOMIC_RELEASE);
    return NULL;
}

/* ---- the flipper ---- */

static void *flipper(void *seed)
{
    static const uint32_t likely[] = {0, 1, 2, 3, 8, 0xff, 0xffff, 0x7fffffff, 0x80000000,
                                      0xffffffff, SLOT, SLOT + 1, SLOT / 2, LIMIT};
    uint64_t random = *(uint64_t *)seed ^ 0xf11bbe5;
    uint8_t *base = memory + PYE_RING_PAGE;
    const size_t stride = (PYE_LANE_HEADER_SIZE + 8 * SLOT + 127) / 128 * 128;

    while (!stopped()) {
        const uint32_t where = next(&random);
        /* Mostly headers; else the states and the whole of both payloads. */
        const size_t at = where % 4 ? PYE_LANE_STATE_SIZE + (where >> 8) % 2 * stride +
                                          (where >> 9) % 8 * 4
                                    : (where >> 8) % ((PYE_LANE_STATE_SIZE + 2 * stride) / 4) * 4;
        uint32_t *word = (uint32_t *)(void *)(base + at);
        const uint32_t how = next(&random);
        const uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
        const uint32_t value = how % 3 == 0   ? how
                               : how % 3 == 1 ? old + (how & 8 ? 8 : 1)
                                              : likely[how / 3 % (sizeof(likely) / 4)];

        __atomic_store_n(word, value, __ATOMIC_RELAXED);
        if (how & 0x10000) { /* and back again: the change that a second fetch would see */
            __atomic_store_n(word, old, __ATOMIC_RELAXED);
        }
        count.flipped++;
        for (uint32_t i = next(&random) % 16000; i > 0; i--) {
            __asm__ volatile("");
        }
        pye_wait_yield(); /* where one processor does everything: else no call survives its turns */
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        return 2;
    }
    uint64_t random = strtoull(argv[2], NULL, 10);

    calls_left = strtoull(argv[1], NULL, 10);
    flips = argc > 3;
    memory_len = pye_ring_size(1, SLOT);
    whole = mmap(NULL, memory_len + 2 * GUARD, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                 -1, 0);
    if (whole == MAP_FAILED) {
        return 2;
    }
    memory = whole + GUARD;
    while (calls_left > 0) {
        pthread_t threads[3];
        void *(*const bodies[3])(void *) = {host, worker, flipper};
        uint64_t seeds[3] = {random, 0, random};

        memset(memory, 0, memory_len);
        memset(whole, 0xa5, GUARD);
        memset(memory + memory_len, 0xa5, GUARD);
        __atomic_store_n(&over, 0, __ATOMIC_RELEASE);
        count.rounds++;
        for (uint32_t i = 0; i < 2; i++) {
            if (pye_lane_new(&lanes[i], memory, memory_len, 1, SLOT, 0,
                             i == 0 ? PYE_SIDE_HOST : PYE_SIDE_WORKER, LIMIT, &ops) != PYE_OK) {
                return 2;
            }
        }
        for (int i = 0; i < 2 + flips; i++) {
            if (pthread_create(&threads[i], NULL, bodies[i], &seeds[i]) != 0) {
                return 2;
            }
        }
        for (int i = 0; i < 2 + flips; i++) {
            (void)pthread_join(threads[i], NULL);
        }
        for (size_t i = 0; i < GUARD; i++) {
            if (whole[i] != 0xa5 || memory[memory_len + i] != 0xa5) {
                fail("something was written beside the ring");
            }
        }
        pye_lane_free(lanes[0]);
        pye_lane_free(lanes[1]);
        random = seeds[0] + 1;
    }
    printf("right %llu wrong %llu refused %llu late %llu broken %llu rounds %llu flipped %llu\n",
           (unsigned long long)count.right, (unsigned long long)count.wrong,
           (unsigned long long)count.refused, (unsigned long long)count.late,
           (unsigned long long)count.broken, (unsigned long long)count.rounds,
           (unsigned long long)count.flipped);
    return 0;
}
