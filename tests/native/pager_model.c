/* pager_model.c - a heap against a reference pager that keeps everything, by random steps.
 *
 *   pager_model model SEED STEPS MECHANISM FILE     one thread, everything compared
 *   pager_model threads SEED STEPS MECHANISM FILE   several, each with its own words of each page
 *
 * MECHANISM is PYE_HEAP_'s number; FILE a path, or "-"; one word more: the heap has a helper. Prints what was done; exits 1 at the first
 * difference. */
#define _GNU_SOURCE
#include "heap_handler.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NUM_PAGES 600u
#define RESIDENT 96u
#define WORDS 512u
#define THREADS 4

static uint64_t state;

/* xorshift64* (Vigna): any seed but zero. */
static uint64_t next(uint64_t *s)
{
    *s ^= *s >> 12;
    *s ^= *s << 25;
    *s ^= *s >> 27;
    return *s * UINT64_C(2685821657736338717);
}

static uint32_t below(uint32_t limit)
{
    return (uint32_t)((next(&state) >> 33) % limit);
}

static void must(int condition, const char *what, uint64_t a, uint64_t b)
{
    if (!condition) {
        printf("%s: %llu %llu\n", what, (unsigned long long)a, (unsigned long long)b);
        exit(1);
    }
}

static void refuse(pye_heap *heap, int reason)
{
    (void)heap;
    (void)reason;
    static const char text[] = "the heap ended\n";

    (void)!write(1, text, sizeof(text) - 1);
    _exit(1);
}

static pye_heap *make(uint32_t mechanism, const char *path)
{
    const int fd = strcmp(path, "-") == 0 ? -1 : open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    const pye_heap_options options = {.capacity_pages = NUM_PAGES, .resident_pages = RESIDENT,
                                      .mechanism = mechanism, .fd = fd,
                                      .tree_above = PYE_HEAP_TREE_ABOVE};
    pye_heap *heap;

    must(pye_heap_new(&heap, &options) == PYE_OK, "new", mechanism, 0);
    must(heap_handlers() == PYE_OK, "handlers", 0, 0);
    must(heap_table_add(heap, (uintptr_t)NUM_PAGES * PYE_HEAP_PAGE_SIZE) == PYE_OK, "table", 0, 0);
    atomic_store(&heap_note, refuse);
    return heap;
}

static void drop(pye_heap *heap)
{
    heap_table_remove(heap);
    pye_heap_free(heap);
}

/* ---- the model ---- */

static uint64_t reference[NUM_PAGES * WORDS];
static uint32_t pins[NUM_PAGES];
static uint64_t versions[NUM_PAGES]; /* the largest one seen of each page */

/* A part of the heap, at most 40 pages. */
static void choose(uint32_t *first, uint32_t *num)
{
    *num = 1 + below(below(4) == 0 ? 40 : 4);
    *first = below(NUM_PAGES - *num + 1);
}

static uint32_t num_pinned(void)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < NUM_PAGES; i++) {
        sum += pins[i] != 0;
    }
    return sum;
}

static int any_pinned(uint32_t first, uint32_t num, int all)
{
    uint32_t sum = 0;

    for (uint32_t i = first; i < first + num; i++) {
        sum += pins[i] != 0;
    }
    return all ? sum == num : sum != 0;
}

static void compare(const uint64_t *view, uint32_t page, uint32_t num)
{
    for (uint32_t i = page * WORDS; i < (page + num) * WORDS; i++) {
        must(view[i] == reference[i], "a word differs", i, view[i]);
    }
}

static void step(pye_heap *heap, uint64_t *view)
{
    uint64_t count;
    uint32_t first;
    uint32_t num;
    pye_status rc;

    choose(&first, &num);
    switch (below(16)) {
    case 0: /* a range is written */
        for (uint32_t i = first * WORDS; i < (first + num) * WORDS; i += 1 + below(64)) {
            view[i] = reference[i] = next(&state);
        }
        break;
    case 1: /* copied inside the heap, which faults at both ends */
        if (first + 2 * num <= NUM_PAGES) {
            memcpy(view + (first + num) * WORDS, view + first * WORDS, num * 4096);
            memcpy(reference + (first + num) * WORDS, reference + first * WORDS, num * 4096);
        }
        break;
    case 2:
        compare(view, first, num);
        break;
    case 3:
        must(pye_heap_prefetch(heap, &count, first, num) == PYE_OK, "prefetch", first, num);
        must(count <= num, "prefetched", count, num);
        break;
    case 4:
        must(pye_heap_evict(heap, &count, first, num) == PYE_OK, "evict", first, num);
        must(count <= num, "evicted", count, num);
        break;
    case 5: {
        uint32_t more = 0;

        for (uint32_t i = first; i < first + num; i++) {
            more += pins[i] == 0;
        }
        rc = pye_heap_pin(heap, first, num);
        must(rc == (num_pinned() + more > RESIDENT - PYE_HEAP_UNPINNED ? PYE_E_LIMIT : PYE_OK),
             "pin", first, num);
        for (uint32_t i = first; rc == PYE_OK && i < first + num; i++) {
            pins[i]++;
        }
        break;
    }
    case 6:
    case 7:
        num = num > 2 ? 2 : num;
        rc = pye_heap_unpin(heap, first, num);
        must(rc == (any_pinned(first, num, 1) ? PYE_OK : PYE_E_STATE), "unpin", first, num);
        for (uint32_t i = first; rc == PYE_OK && i < first + num; i++) {
            pins[i]--;
        }
        break;
    case 8:
        if (below(4) == 0) {
            rc = pye_heap_discard(heap, first, num);
            must(rc == (any_pinned(first, num, 0) ? PYE_E_BUSY : PYE_OK), "discard", first, num);
            if (rc == PYE_OK) {
                memset(reference + first * WORDS, 0, num * 4096);
                memset(versions + first, 0, num * sizeof(versions[0]));
            }
        }
        break;
    case 9:
    case 10: { /* a version never goes back, so no older page is ever accepted */
        uint64_t version;
        uint8_t tag[16];

        must(pye_heap_meta(heap, &version, tag, first) == PYE_OK, "meta", first, 0);
        must(version >= versions[first], "a version went back", version, versions[first]);
        versions[first] = version;
        break;
    }
    default: { /* single words, as a hash table would */
        const uint32_t i = below(NUM_PAGES * WORDS);

        must(view[i] == reference[i], "a word differs", i, view[i]);
        view[i] = reference[i] = next(&state);
        break;
    }
    }
}

static void check_counters(pye_heap *heap)
{
    pye_heap_stats stats;

    must(pye_heap_stats_read(heap, &stats) == PYE_OK, "stats", 0, 0);
    must(stats.resident <= RESIDENT && stats.resident_peak <= RESIDENT, "resident", stats.resident,
         stats.resident_peak);
    must(stats.pinned == num_pinned(), "pinned", stats.pinned, num_pinned());
    must(stats.evictions == stats.pages_out + stats.clean_drops, "evictions", stats.evictions,
         stats.pages_out);
}

static void run_model(pye_heap *heap, uint64_t steps)
{
    uint64_t *const view = pye_heap_base(heap);

    for (uint64_t i = 0; i < steps; i++) {
        step(heap, view);
        if (i % 64 == 0) {
            check_counters(heap);
        }
    }
    compare(view, 0, NUM_PAGES);
}

/* ---- threads ---- */

static pye_heap *shared;
static uint64_t rounds;
static uint64_t first_seed;
static _Atomic int running;

/* Each thread adds to its own words of pages that all use, in any order, and counts what it did. */
static void *adds(void *argument)
{
    const uintptr_t me = (uintptr_t)argument;
    uint64_t *const view = pye_heap_base(shared);
    uint64_t seed = first_seed + me;
    uint64_t *const own = calloc(NUM_PAGES, sizeof(uint64_t));

    must(own != NULL, "memory", me, 0);
    for (uint64_t i = 0; i < rounds; i++) {
        const uint32_t start = (uint32_t)((next(&seed) >> 33) % NUM_PAGES);
        const uint32_t num = i % 7 == 0 ? 30 : 1;

        for (uint32_t page = start; page < start + num && page < NUM_PAGES; page++) {
            /* A plain addition: a page that went between its read and its write must come back. */
            ((volatile uint64_t *)view)[page * WORDS + me * 8]++;
            own[page]++;
        }
    }
    for (uint32_t page = 0; page < NUM_PAGES; page++) {
        must(view[page * WORDS + me * 8] == own[page], "a write was lost", page, me);
    }
    free(own);
    atomic_fetch_sub(&running, 1);
    return NULL;
}

static void run_threads(pye_heap *heap, uint64_t steps)
{
    pthread_t threads[THREADS];
    uint64_t turns = 0;

    shared = heap;
    rounds = steps / THREADS;
    first_seed = state | 1 << 8;
    atomic_store(&running, THREADS);
    for (uintptr_t i = 0; i < THREADS; i++) {
        must(pthread_create(&threads[i], NULL, adds, (void *)i) == 0, "thread", i, 0);
    }
    while (atomic_load(&running) != 0) {
        uint32_t first;
        uint32_t num;

        choose(&first, &num);
        must(pye_heap_evict(heap, NULL, first, num) == PYE_OK, "evict", first, num);
        must(pye_heap_prefetch(heap, NULL, first, num) == PYE_OK, "prefetch", first, num);
        turns++;
    }
    for (int i = 0; i < THREADS; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    must(turns != 0, "nothing was evicted meanwhile", 0, 0);
    check_counters(heap);
}

static void *helps(void *heap)
{
    pye_heap_help(heap);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t helper;

    must(argc == 6 || argc == 7, "usage: model|threads SEED STEPS MECHANISM FILE [helped]",
         (uint64_t)argc, 6);
    state = strtoull(argv[2], NULL, 0) | 1;
    const uint64_t steps = strtoull(argv[3], NULL, 0);
    pye_heap *const heap = make((uint32_t)atoi(argv[4]), argv[5]);

    if (argc == 7) {
        must(pye_heap_hire(heap) == PYE_OK, "hire", 0, 0);
        must(pthread_create(&helper, NULL, helps, heap) == 0, "thread", 0, 0);
    }
    if (strcmp(argv[1], "model") == 0) {
        run_model(heap, steps);
    } else {
        run_threads(heap, steps);
    }
    if (argc == 7) {
        pye_heap_dismiss(heap);
        (void)pthread_join(helper, NULL);
    }
    pye_heap_stats stats;
    must(pye_heap_stats_read(heap, &stats) == PYE_OK, "stats", 0, 0);
    printf("%s: %llu steps, %llu faults, %llu in, %llu out, %llu dropped\n", argv[1],
           (unsigned long long)steps, (unsigned long long)stats.faults,
           (unsigned long long)stats.pages_in, (unsigned long long)stats.pages_out,
           (unsigned long long)stats.clean_drops);
    drop(heap);
    return 0;
}
