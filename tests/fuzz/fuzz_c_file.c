/* fuzz_c_file.c - a sealed heap whose cold pages, and the nodes of whose version tree, lie in a file
 * that somebody else writes to, replays and cuts short between our calls. docs/fuzzing.md. */
#define _GNU_SOURCE
#include "fuzz_c.h"

#include "pyenclave/gcm.h"
#include "pyenclave/heap.h"

#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = PYE_HEAP_PAGE_SIZE, PAGES = 300, PLACES = PAGES + 8, MOST = 24 };

static int file = -1;
static uint8_t older[PLACES * PAGE]; /* the file as it was when it was kept */
static size_t older_size;
static uint8_t filled[PAGES]; /* what is in each page */
static pye_heap *heap;
static int tampered;

static void keep(void)
{
    const ssize_t got = pread(file, older, sizeof(older), 0);

    older_size = got > 0 ? (size_t)got : 0;
}

/* tamper does to the file what its owner may do. */
static void tamper(fuzz_input *input)
{
    const uint64_t what = fuzz_take(input, 1) % 6;
    const off_t place = (off_t)(fuzz_take(input, 2) % PLACES) * PAGE;
    const off_t other = (off_t)(fuzz_take(input, 2) % PLACES) * PAGE;
    uint8_t page[PAGE] = {0};

    if (what == 0) { /* now, or for later */
        keep();
        return;
    }
    tampered = 1;
    if (what == 1) { /* a byte, or none at all */
        const off_t at = place + other / PAGE;
        uint8_t byte = 0;
        FUZZ_CHECK(pread(file, &byte, 1, at) >= 0, "pread");
        byte ^= (uint8_t)fuzz_take(input, 1);
        FUZZ_CHECK(pwrite(file, &byte, 1, at) == 1, "pwrite");
    } else if (what == 2) { /* a page of the past */
        const size_t from = (size_t)place;
        if (from + PAGE <= older_size) {
            FUZZ_CHECK(pwrite(file, older + from, PAGE, place) == PAGE, "pwrite");
        }
    } else if (what == 3) { /* another page */
        FUZZ_CHECK(pread(file, page, PAGE, other) >= 0, "pread");
        FUZZ_CHECK(pwrite(file, page, PAGE, place) == PAGE, "pwrite");
    } else if (what == 4) {
        FUZZ_CHECK(ftruncate(file, place + other / PAGE) == 0, "ftruncate");
    } else { /* all as it was */
        FUZZ_CHECK(ftruncate(file, 0) == 0, "ftruncate");
        FUZZ_CHECK(pwrite(file, older, older_size, 0) == (ssize_t)older_size, "pwrite");
    }
}

/* With pages pinned: each is what was put, and is given something else. */
static void use(uint64_t first, uint64_t num, int write)
{
    uint8_t *const view = pye_heap_base(heap);

    for (uint64_t page = first; page < first + num; page++) {
        uint8_t *const at = view + page * PAGE;
        FUZZ_CHECK(at[0] == filled[page] && memcmp(at, at + 1, PAGE - 1) == 0, "other bytes");
        if (write) {
            filled[page]++;
            memset(at, filled[page], PAGE);
        }
    }
}

static pye_status step(uint64_t op, uint64_t first, uint64_t num)
{
    pye_status rc;

    switch (op) {
    case 0:
        rc = pye_heap_evict(heap, NULL, first, num);
        break;
    case 1:
        rc = pye_heap_discard(heap, first, num);
        for (uint64_t page = first; rc == PYE_OK && page < first + num; page++) {
            filled[page] = 0;
        }
        break;
    case 2:
        rc = pye_heap_prefetch(heap, NULL, first, num);
        break;
    default:
        rc = pye_heap_pin(heap, first, num);
        if (rc == PYE_OK) {
            use(first, num, op & 1);
            FUZZ_CHECK(pye_heap_unpin(heap, first, num) == PYE_OK, "unpin");
        }
        break;
    }
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input = {data, size};
    const uint64_t how = fuzz_take(&input, 1);
    if (file < 0) {
        file = memfd_create("cold", 0);
    }
    const pye_heap_options options = {.capacity_pages = PAGES,
                                      .resident_pages = PYE_HEAP_MIN_RESIDENT,
                                      .mechanism = how & 1 ? PYE_HEAP_MPROTECT : PYE_HEAP_AUTO,
                                      .tree_above = how & 2 ? PYE_HEAP_TREE_ABOVE : 0,
                                      .tree_cache = 1,
                                      .fd = file};
    pye_heap_stats stats;
    int dead = 0;

    FUZZ_CHECK(file >= 0 && ftruncate(file, 0) == 0, "no file");
    memset(filled, 0, sizeof(filled));
    older_size = 0;
    tampered = 0;
    FUZZ_CHECK(pye_heap_new(&heap, &options) == PYE_OK, "no heap");
    for (int i = 0; i < MOST && input.left > 0; i++) {
        const uint64_t op = fuzz_take(&input, 1) % 8;
        if (op == 7) {
            tamper(&input);
            continue;
        }
        const uint64_t first = fuzz_take(&input, 2) % (PAGES + 2);
        const uint64_t num = fuzz_take(&input, 1);
        const int fits = first <= PAGES && num <= PAGES - first;
        const pye_status rc = step(op, first, num);
        uint64_t page;
        int32_t error;
        FUZZ_CHECK(pye_heap_poisoned(heap, &page, &error) ==
                       (rc == PYE_E_POISONED || dead ? PYE_E_AUTH : PYE_OK),
                   "why it ended");
        FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_POISONED || (rc == PYE_E_ARGUMENT && !fits) ||
                       (rc == PYE_E_LIMIT && op > 2 && num > PYE_HEAP_MIN_RESIDENT - 32),
                   "a status");
        FUZZ_CHECK(fits || rc == PYE_E_ARGUMENT, "beyond the heap");
        dead |= rc == PYE_E_POISONED;
        FUZZ_CHECK(!dead || tampered, "it ended by itself");
        FUZZ_CHECK(!dead || !fits || rc == PYE_E_POISONED, "a dead heap goes on");
        FUZZ_CHECK(pye_heap_stats_read(heap, &stats) == PYE_OK &&
                       stats.resident <= PYE_HEAP_MIN_RESIDENT && stats.pinned == 0 &&
                       (!dead || stats.resident == 0),
                   "what is resident");
        FUZZ_CHECK((pye_heap_frame(heap, 0) == NULL) == dead, "frames of a dead heap");
    }
    pye_heap_free(heap);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* how; then op, first (2), num; 7 what place (2) other (2), and for 1 the change */
    static const uint8_t seeds[][48] = {
        {0, 3, 0, 0, 20, 0, 0, 0, 200, 7, 1, 5, 0, 9, 0, 1, 3, 0, 0, 20},
        {2, 3, 0, 0, 20, 0, 0, 0, 200, 7, 0, 0, 0, 0, 0, 3, 0, 0, 9, 0, 0, 0, 200, 7, 2, 3, 0, 0, 0,
         4, 0, 0, 20},
        {1, 3, 0, 0, 30, 3, 30, 0, 30, 3, 60, 0, 30, 3, 90, 0, 30, 4, 0, 0, 30, 7, 3, 2, 0, 3, 0, 4,
         0, 0, 30},
        {3, 3, 130, 0, 30, 0, 0, 0, 255, 1, 130, 0, 9, 4, 130, 0, 30, 0, 0, 0, 255, 7, 4, 9, 0, 0, 0,
         2, 130, 0, 30},
        {0, 3, 0, 0, 30, 3, 140, 0, 30, 3, 240, 0, 30, 0, 0, 0, 255, 7, 0, 0, 0, 0, 0, 3, 0, 0, 2, 0,
         0, 0, 255, 7, 5, 0, 0, 0, 0, 4, 0, 0, 30},
        {0, 3, 0, 0, 30, 3, 140, 0, 30, 0, 0, 0, 255, 1, 140, 0, 30, 3, 200, 0, 9, 0, 0, 0, 255, 7, 1,
         45, 1, 1, 0, 8, 4, 0, 0, 30},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
