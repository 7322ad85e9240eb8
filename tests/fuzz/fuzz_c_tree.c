/* fuzz_c_tree.c - the version tree over a storage that changes, replays, swaps and fails.
 * docs/fuzzing.md. */
#include "fuzz_c.h"

#include "pyenclave/gcm.h"
#include "pyenclave/tree.h"

enum { PAGES = 128 * 40 - 5, NODES = 42, CACHE = 16, RUN = 300 };

typedef struct {
    uint8_t now[NODES][PYE_PAGE_SIZE];   /* what a load gives */
    uint8_t good[NODES][PYE_PAGE_SIZE];  /* what was stored last */
    uint8_t older[NODES][PYE_PAGE_SIZE]; /* and before that */
    int there[NODES];
    int bad[NODES]; /* `now` was written by somebody else since */
    int fails;
    int met_bad; /* a load gave what is not good */
} storage;

static storage disk;

static pye_status load(void *context, const uint8_t **at, uint8_t *room, uint64_t node)
{
    (void)context;
    FUZZ_CHECK(node < NODES && disk.there[node], "a node is loaded that was never stored");
    if (disk.fails & 1) {
        return PYE_E_OS;
    }
    disk.met_bad |= disk.bad[node] && memcmp(disk.now[node], disk.good[node], PYE_PAGE_SIZE) != 0;
    if (node % 2 == 0) {
        memcpy(room, disk.now[node], PYE_PAGE_SIZE);
        *at = room;
    } else {
        *at = disk.now[node];
    }
    return PYE_OK;
}

static pye_status store(void *context, uint64_t node, const uint8_t *sealed)
{
    (void)context;
    FUZZ_CHECK(node < NODES, "a node beyond the storage");
    if (disk.fails & 2) {
        return PYE_E_DENIED;
    }
    memcpy(disk.older[node], disk.there[node] ? disk.good[node] : sealed, PYE_PAGE_SIZE);
    memcpy(disk.good[node], sealed, PYE_PAGE_SIZE);
    memcpy(disk.now[node], sealed, PYE_PAGE_SIZE);
    disk.there[node] = 1;
    disk.bad[node] = 0;
    return PYE_OK;
}

static void drop(void *context, uint64_t node)
{
    (void)context;
    FUZZ_CHECK(node < NODES && disk.there[node], "a node is dropped that was never stored");
    disk.there[node] = 0;
}

/* tamper does to the storage what its owner may do. */
static void tamper(fuzz_input *input)
{
    const uint64_t node = fuzz_take(input, 1) % NODES;
    const uint64_t what = fuzz_take(input, 1) % 4;
    const uint64_t value = fuzz_take(input, 2);

    if (what == 0) {
        disk.now[node][value % PYE_PAGE_SIZE] ^= (uint8_t)(1u << (value >> 12) % 8);
    } else if (what == 1) {
        memcpy(disk.now[node], disk.older[node], PYE_PAGE_SIZE);
    } else if (what == 2) {
        memcpy(disk.now[node], disk.now[value % NODES], PYE_PAGE_SIZE);
    } else {
        memcpy(disk.now[node], disk.good[node], PYE_PAGE_SIZE); /* it takes it back */
    }
    disk.bad[node] = 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t keys[1 << 16] __attribute__((aligned(64)));
    static uint8_t memory[1 << 18] __attribute__((aligned(64)));
    static pye_tree_entry model[PAGES], got[RUN], zeroes[RUN];
    static const uint8_t secret[PYE_EPOCH_SECRET_SIZE] = {7}, name[PYE_PAGE_ENCLAVE_SIZE] = {9};
    pye_epoch_key *key = (pye_epoch_key *)(void *)keys;
    pye_tree *tree = (pye_tree *)(void *)memory;
    const pye_tree_options options = {PAGES, CACHE, key, {NULL, load, store, drop}};
    fuzz_input input = {data, size};
    pye_tree_stats stats;
    uint64_t count = 0;
    int dead = 0;

    memset(&disk, 0, sizeof(disk));
    memset(model, 0, sizeof(model));
    FUZZ_CHECK(pye_epoch_key_size() <= sizeof(keys) && pye_tree_size(&options) <= sizeof(memory),
               "sizes");
    FUZZ_CHECK(pye_tree_num_nodes(PAGES) == NODES - 1, "nodes");
    FUZZ_CHECK(pye_epoch_key_init(key, secret, name, UINT32_MAX) == PYE_OK, "key");
    FUZZ_CHECK(pye_tree_init(tree, &options) == PYE_OK, "init");
    for (int i = 0; i < 60 && input.left > 0; i++) {
        const uint64_t op = fuzz_take(&input, 1) % 12;
        const uint64_t page = fuzz_take(&input, 2) % (PAGES + 20);
        const size_t num = (size_t)fuzz_take(&input, 2) % RUN;
        const int fits = page < PAGES && num <= PAGES - page && num > 0;
        pye_status rc = PYE_OK;

        disk.fails = 0;
        if (op < 2) { /* the storage fails in this call and the next */
            disk.fails = 1 + (int)num % 3;
        }
        if (op == 2 || op == 3) {
            tamper(&input);
            continue;
        }
        if (op == 4) {
            rc = pye_tree_trim(tree, (uint32_t)num % CACHE);
        } else if (op % 2 == 0) {
            memset(got, 0xcc, sizeof(got));
            rc = pye_tree_get(tree, got, page, num);
            if (rc == PYE_OK) {
                FUZZ_CHECK(fits && memcmp(got, &model[page], num * sizeof(got[0])) == 0,
                           "other entries");
            } else if (fits && !dead) {
                FUZZ_CHECK(memcmp(got, zeroes, num * sizeof(got[0])) == 0, "not zero");
            }
        } else {
            const uint64_t pages[] = {page, PAGES - 1 - page % PAGES, (page + num) % PAGES};
            for (size_t k = 0; k < 3; k++) {
                got[k].version = op == 11 ? 0 : ++count;
                memset(got[k].tag, (int)count, sizeof(got[k].tag));
                got[k].flags = num;
            }
            rc = pye_tree_prepare(tree, pages, 3);
            FUZZ_CHECK(rc != PYE_E_LIMIT, "no room for three leaves");
            if (rc == PYE_OK) {
                disk.fails = 3; /* what is prepared needs no storage */
                rc = pye_tree_put_many(tree, got, pages, 3);
                FUZZ_CHECK(rc == PYE_OK, "prepared, and not put");
                for (size_t k = 0; k < 3; k++) {
                    model[pages[k]] = got[k].version == 0 ? zeroes[0] : got[k];
                }
            }
            pye_tree_release(tree);
        }
        FUZZ_CHECK(!dead || rc == PYE_E_POISONED, "a dead tree goes on");
        FUZZ_CHECK((rc == PYE_E_AUTH) == (disk.met_bad && !dead), "a bad node, and its status");
        FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_AUTH || rc == PYE_E_POISONED ||
                       (rc == PYE_E_ARGUMENT && page >= PAGES - RUN) ||
                       (rc == PYE_E_LENGTH && num == 0) || (rc == PYE_E_OS && disk.fails & 1) ||
                       (rc == PYE_E_DENIED && disk.fails & 2),
                   "a status");
        dead |= rc == PYE_E_AUTH;
        pye_tree_read_stats(tree, &stats);
        FUZZ_CHECK(stats.cached <= CACHE && (dead || stats.dirty <= stats.cached), "the cache");
    }
    pye_tree_destroy(tree);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* op, page (2), num (2); after op 2 also node, what, value (2) */
    static const uint8_t seeds[][40] = {
        {5, 1, 0, 9, 0, 4, 0, 0, 0, 0, 6, 1, 0, 9, 0, 7, 1, 0, 8, 0, 4, 0, 0, 0, 0, 8, 0, 0, 200, 0},
        {5, 1, 0, 9, 0, 4, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 7, 16, 6, 1, 0, 9, 0, 6, 1, 0, 9, 0},
        {5, 1, 0, 9, 0, 4, 0, 0, 0, 0, 7, 1, 0, 9, 0, 4, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 6},
        {5, 1, 0, 9, 0, 5, 0, 5, 0, 1, 4, 0, 0, 0, 0, 2, 0, 0, 0, 0, 40, 1, 0, 0, 8, 9, 0, 9, 0},
        {5, 1, 0, 9, 0, 4, 0, 0, 0, 0, 1, 1, 0, 9, 0, 0, 1, 0, 9, 0, 11, 1, 0, 9, 0, 4, 0, 0, 0, 0},
        {5, 0, 0, 9, 2, 5, 0, 2, 9, 4, 7, 0, 4, 9, 9, 5, 0, 6, 9, 7, 5, 0, 8, 9, 3, 7, 0, 10, 9, 1,
         6, 0, 0, 44, 1, 5, 0, 12, 9, 1},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
