/* tree.c - the version tree: entries of pages, found through nodes that are kept outside. */
#include "base/check.h"
#include "page/tree_impl.h"

#include <string.h>

_Static_assert((uint64_t)1 << (7 * PYE_TREE_LEVELS) >= PYE_TREE_MAX_PAGES, "enough levels");

#define FANOUT_BITS 7

enum { LIVE = 1, ENDED = 2, POISONED = 3 };

/* Where the parts of a tree lie in its memory. */
typedef struct {
    size_t slots, buckets, scratch, room, nodes, size;
    uint32_t num_buckets;
} layout;

static size_t aligned(size_t size)
{
    return (size + PYE_TREE_ALIGN - 1) / PYE_TREE_ALIGN * PYE_TREE_ALIGN;
}

static uint32_t cache_of(const pye_tree_options *options)
{
    return options->cache_nodes == 0 ? PYE_TREE_CACHE : options->cache_nodes;
}

static layout plan(uint32_t cache_nodes)
{
    layout l;

    l.num_buckets = PYE_TREE_MIN_CACHE;
    while (l.num_buckets < cache_nodes) {
        l.num_buckets *= 2;
    }
    l.slots = aligned(sizeof(pye_tree));
    l.buckets = l.slots + aligned((size_t)cache_nodes * sizeof(tree_slot));
    l.scratch = l.buckets + aligned((size_t)l.num_buckets * sizeof(uint32_t));
    l.room = l.scratch + PYE_PAGE_SIZE;
    l.nodes = l.room + PYE_PAGE_SIZE;
    l.size = l.nodes + (size_t)cache_nodes * PYE_PAGE_SIZE;
    return l;
}

static int options_fit(const pye_tree_options *options)
{
    PYE_REFUSE_IF(options == NULL, 0);
    const uint32_t nodes = cache_of(options);
    PYE_REFUSE_IF(options->num_pages == 0 || options->num_pages > PYE_TREE_MAX_PAGES, 0);
    PYE_REFUSE_IF(nodes < PYE_TREE_MIN_CACHE || nodes > PYE_TREE_MAX_CACHE, 0);
    return 1;
}

size_t pye_tree_size(const pye_tree_options *options)
{
    PYE_REFUSE_IF(!options_fit(options), 0);
    return plan(cache_of(options)).size;
}

/* count_levels writes the number of each level's first node, and returns how many nodes there are. */
static uint64_t count_levels(uint64_t num_pages, uint64_t base[PYE_TREE_LEVELS], uint32_t *levels)
{
    uint64_t total = 0;
    uint64_t num = num_pages;

    *levels = 0;
    do {
        num = (num + PYE_TREE_FANOUT - 1) >> FANOUT_BITS;
        base[(*levels)++] = total;
        total += num;
    } while (num > 1);
    return total;
}

uint64_t pye_tree_num_nodes(uint64_t num_pages)
{
    uint64_t base[PYE_TREE_LEVELS];
    uint32_t levels;

    PYE_REFUSE_IF(num_pages == 0 || num_pages > PYE_TREE_MAX_PAGES, 0);
    return count_levels(num_pages, base, &levels);
}

pye_status pye_tree_init(pye_tree *tree, const pye_tree_options *options)
{
    PYE_REFUSE_IF(tree == NULL || !options_fit(options), PYE_E_ARGUMENT);
    PYE_REFUSE_IF(options->key == NULL || options->storage.load == NULL ||
                      options->storage.store == NULL,
                  PYE_E_ARGUMENT);
    PYE_REFUSE_IF((uintptr_t)tree % PYE_TREE_ALIGN != 0, PYE_E_ALIGNMENT);
    const uint32_t nodes = cache_of(options);
    const layout l = plan(nodes);
    uint8_t *memory = (uint8_t *)tree;

    memset(tree, 0, sizeof(*tree));
    tree->key = options->key;
    tree->slots = (tree_slot *)(void *)(memory + l.slots);
    tree->buckets = (uint32_t *)(void *)(memory + l.buckets);
    tree->scratch = memory + l.scratch;
    tree->room = memory + l.room;
    tree->nodes = memory + l.nodes;
    memset(tree->buckets, 0xff, (size_t)l.num_buckets * sizeof(uint32_t)); /* NO_SLOT */
    tree->bucket_mask = l.num_buckets - 1;
    tree->cache_nodes = nodes;
    tree->num_pages = options->num_pages;
    (void)count_levels(options->num_pages, tree->base, &tree->levels);
    tree->storage = options->storage;
    tree->free = NO_SLOT;
    tree->last = NO_SLOT;
    tree->state = LIVE;
    return PYE_OK;
}

static void end(pye_tree *tree, uint32_t state)
{
    pye_epoch_key_destroy(tree->key);
    pye_wipe(tree->nodes, (size_t)tree->num_slots * PYE_PAGE_SIZE);
    pye_wipe(&tree->root, sizeof(tree->root));
    tree->state = state;
}

void tree_fail(pye_tree *tree, int poisoned)
{
    end(tree, poisoned ? POISONED : ENDED);
}

void pye_tree_destroy(pye_tree *tree)
{
    if (tree != NULL && tree->state == LIVE) {
        end(tree, ENDED);
    }
}

static pye_status check_state(const pye_tree *tree)
{
    PYE_REFUSE_IF(tree == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(tree->state == 0, PYE_E_STATE);
    PYE_REFUSE_IF(tree->state == POISONED, PYE_E_POISONED);
    PYE_REFUSE_IF(tree->state != LIVE, PYE_E_CLOSED);
    return PYE_OK;
}

/* lowest finds the lowest node on the way to a leaf that is in the cache: its slot, or NO_SLOT, and
 * its level, or the number of levels. */
static uint32_t lowest(const pye_tree *tree, uint32_t *level, uint64_t leaf)
{
    for (*level = 0; *level < tree->levels; (*level)++) {
        const uint32_t at =
            tree_find(tree, tree->base[*level] + (leaf >> (FANOUT_BITS * *level)));
        if (at != NO_SLOT) {
            return at;
        }
    }
    return NO_SLOT;
}

/* reach gives the slot of a leaf: from the lowest of its ancestors that is in the cache down. */
static pye_status reach(pye_tree *tree, uint32_t *slot, uint64_t leaf)
{
    uint32_t level;

    if (tree->last != NO_SLOT && tree->last_leaf == leaf) {
        *slot = tree->last;
        tree->stats.found++;
        return PYE_OK;
    }
    uint32_t at = lowest(tree, &level, leaf);
    tree->stats.found += level == 0;
    while (level > 0) {
        level--;
        PYE_TRY(tree_bring(tree, &at, level, leaf >> (FANOUT_BITS * level), at));
    }
    tree->slots[at].used = 1;
    tree->last = at;
    tree->last_leaf = leaf;
    *slot = at;
    return PYE_OK;
}

/* check_run looks at the arguments of a run. */
static pye_status check_run(const pye_tree *tree, const void *entries, uint64_t first,
                            uint64_t num)
{
    PYE_TRY(check_state(tree));
    PYE_REFUSE_IF(entries == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num == 0, PYE_E_LENGTH);
    PYE_REFUSE_IF(first >= tree->num_pages || num > tree->num_pages - first, PYE_E_ARGUMENT);
    return PYE_OK;
}

static pye_status check_many(const pye_tree *tree, const uint64_t *pages, size_t num)
{
    PYE_TRY(check_state(tree));
    PYE_REFUSE_IF(pages == NULL, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(num == 0, PYE_E_LENGTH);
    for (size_t i = 0; i < num; i++) {
        PYE_REFUSE_IF(pages[i] >= tree->num_pages, PYE_E_ARGUMENT);
    }
    return PYE_OK;
}

/* set writes one entry to a leaf. */
static void set(pye_tree *tree, uint32_t slot, uint64_t page, const pye_tree_entry *entry)
{
    static const pye_tree_entry nothing = {0};

    tree_entries(tree, slot)[page % PYE_TREE_FANOUT] = entry->version == 0 ? nothing : *entry;
    tree_mark_dirty(tree, slot);
}

pye_status pye_tree_get(pye_tree *tree, pye_tree_entry *entries, uint64_t first, size_t num)
{
    pye_status rc;
    uint32_t slot = NO_SLOT;

    PYE_TRY(check_run(tree, entries, first, num));
    for (size_t done = 0, n; done < num; done += n) {
        const uint64_t page = first + done;
        const size_t place = (size_t)(page % PYE_TREE_FANOUT);

        n = num - done < PYE_TREE_FANOUT - place ? num - done : PYE_TREE_FANOUT - place;
        PYE_CHECK(reach(tree, &slot, page / PYE_TREE_FANOUT));
        memcpy(entries + done, tree_entries(tree, slot) + place, n * sizeof(*entries));
    }
    return PYE_OK;
done:
    memset(entries, 0, num * sizeof(*entries));
    return rc;
}

pye_status pye_tree_put(pye_tree *tree, const pye_tree_entry *entries, uint64_t first, size_t num)
{
    uint32_t slot = NO_SLOT;

    PYE_TRY(check_run(tree, entries, first, num));
    for (size_t i = 0; i < num; i++) {
        PYE_TRY(reach(tree, &slot, (first + i) / PYE_TREE_FANOUT));
        set(tree, slot, first + i, &entries[i]);
    }
    return PYE_OK;
}

/* clear_leaf zeroes entries of a leaf that is in the cache, and returns the first page behind them. */
static uint64_t clear_leaf(pye_tree *tree, uint32_t slot, uint64_t page, uint64_t end)
{
    const uint64_t behind = (page / PYE_TREE_FANOUT + 1) * PYE_TREE_FANOUT;
    const uint64_t stop = end < behind ? end : behind;

    memset(tree_entries(tree, slot) + page % PYE_TREE_FANOUT, 0,
           (size_t)(stop - page) * sizeof(pye_tree_entry));
    tree_mark_dirty(tree, slot);
    return stop;
}

pye_status pye_tree_clear(pye_tree *tree, uint64_t first, uint64_t num)
{
    uint64_t page = first;

    PYE_TRY(check_run(tree, tree, first, num));
    while (page < first + num) {
        const uint64_t leaf = page / PYE_TREE_FANOUT;
        uint32_t level;
        uint32_t at = lowest(tree, &level, leaf);

        if (level == 0) {
            page = clear_leaf(tree, at, page, first + num);
            continue;
        }
        /* The next one on the way is not in the cache: its entry is all there is to know of it. */
        level--;
        const uint64_t child = leaf >> (FANOUT_BITS * level);
        const pye_tree_entry *entry =
            at == NO_SLOT ? &tree->root : &tree_entries(tree, at)[child % PYE_TREE_FANOUT];
        if (entry->version == 0) {
            page = ((child + 1) << (FANOUT_BITS * level)) * PYE_TREE_FANOUT;
        } else {
            PYE_TRY(tree_bring(tree, &at, level, child, at));
        }
    }
    return PYE_OK;
}

pye_status pye_tree_get_many(pye_tree *tree, pye_tree_entry *entries, const uint64_t *pages,
                             size_t num)
{
    pye_status rc;
    uint32_t slot = NO_SLOT;

    PYE_TRY(check_many(tree, pages, num));
    PYE_REFUSE_IF(entries == NULL, PYE_E_ARGUMENT);
    for (size_t i = 0; i < num; i++) {
        PYE_CHECK(reach(tree, &slot, pages[i] / PYE_TREE_FANOUT));
        entries[i] = tree_entries(tree, slot)[pages[i] % PYE_TREE_FANOUT];
    }
    return PYE_OK;
done:
    memset(entries, 0, num * sizeof(*entries));
    return rc;
}

pye_status pye_tree_put_many(pye_tree *tree, const pye_tree_entry *entries, const uint64_t *pages,
                             size_t num)
{
    uint32_t slot = NO_SLOT;

    PYE_TRY(check_many(tree, pages, num));
    PYE_REFUSE_IF(entries == NULL, PYE_E_ARGUMENT);
    for (size_t i = 0; i < num; i++) {
        PYE_TRY(reach(tree, &slot, pages[i] / PYE_TREE_FANOUT));
        set(tree, slot, pages[i], &entries[i]);
    }
    return PYE_OK;
}

void pye_tree_release(pye_tree *tree)
{
    if (tree != NULL) {
        tree->pin = 0;
    }
}

pye_status pye_tree_prepare(pye_tree *tree, const uint64_t *pages, size_t num)
{
    uint32_t slot = NO_SLOT;

    PYE_TRY(check_many(tree, pages, num));
    if (++tree->last_pin == 0) { /* once in 2^32: those of long ago would count as of now */
        for (uint32_t i = 0; i < tree->num_slots; i++) {
            tree->slots[i].pinned = 0;
        }
        tree->last_pin = 1;
    }
    tree->pin = tree->last_pin;
    for (size_t i = 0; i < num; i++) {
        const pye_status rc = reach(tree, &slot, pages[i] / PYE_TREE_FANOUT);
        if (PYE_GUARD(rc != PYE_OK)) {
            pye_tree_release(tree);
            return rc;
        }
        tree->slots[slot].pinned = tree->pin;
    }
    return PYE_OK;
}

pye_status pye_tree_trim(pye_tree *tree, uint32_t nodes)
{
    PYE_TRY(check_state(tree));
    while (tree->cached > nodes) {
        PYE_TRY(tree_evict_one(tree, NO_SLOT));
    }
    return PYE_OK;
}

void pye_tree_read_stats(const pye_tree *tree, pye_tree_stats *stats)
{
    *stats = tree->stats;
    stats->levels = tree->levels;
    stats->cache_nodes = tree->cache_nodes;
    stats->cached = tree->cached;
    stats->dirty = tree->dirty;
}

pye_status pye_tree_skip(pye_tree *tree, uint64_t next)
{
    PYE_TRY(check_state(tree));
    return pye_epoch_skip(tree->key, next);
}

static pye_status load_memory(void *context, const uint8_t **at, uint8_t *room, uint64_t node)
{
    (void)room;
    *at = (const uint8_t *)context + (size_t)node * PYE_PAGE_SIZE;
    return PYE_OK;
}

static pye_status store_memory(void *context, uint64_t node, const uint8_t *sealed)
{
    memcpy((uint8_t *)context + (size_t)node * PYE_PAGE_SIZE, sealed, PYE_PAGE_SIZE);
    return PYE_OK;
}

void pye_tree_in_memory(pye_tree_storage *storage, uint8_t *base)
{
    storage->context = base;
    storage->load = load_memory;
    storage->store = store_memory;
    storage->drop = NULL;
}
