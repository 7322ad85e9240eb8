/* tree.h - the version tree: versions and tags of any number of pages, kept outside.
 *
 * A page that was evicted can be told from an older one by its version and tag only. The tree keeps
 * them in nodes of 4096 bytes, 128 entries each; nodes are sealed pages themselves, and lie in
 * storage that may be hostile. The entry of a node is in its parent, that of the topmost node in
 * the tree, in trusted memory. So memory is a cache of fixed size, however many pages there are.
 * docs/formats/heap.md has the bytes.
 *
 * A node that was changed is sealed when it leaves the cache, with a new version. A node whose
 * entries are all zero needs no storage: what was never put is zero, and costs nothing.
 *
 * A node that is not what the tree stored last (changed, older, another's) gives PYE_E_AUTH, and
 * the tree is destroyed: it gives PYE_E_POISONED from then on. A storage that fails gives its own
 * status, and nothing is lost: the call may be made again.
 *
 * One thread at a time. Nothing is allocated and no system call made but the storage's.
 */
#ifndef PYENCLAVE_TREE_H
#define PYENCLAVE_TREE_H

#include "pyenclave/base.h"
#include "pyenclave/epoch.h"
#include "pyenclave/page.h"

#define PYE_TREE_FANOUT 128
#define PYE_TREE_ALIGN 64
/* 2^40 pages are 4 PiB. */
#define PYE_TREE_MAX_PAGES 1099511627776
/* Nodes in the cache: 16 MiB are the default, 64 KiB the least, 2 GiB the most. */
#define PYE_TREE_CACHE 4096
#define PYE_TREE_MIN_CACHE 16
#define PYE_TREE_MAX_CACHE 524288
/* So many leaves can be prepared at once in a cache of 6 * (so many + 1) nodes. */
#define PYE_TREE_LEVELS 6

typedef struct pye_tree pye_tree;

/* What is kept of a page. Version 0: nothing, and then the rest is zero, too. */
typedef struct {
    uint64_t version;
    uint8_t tag[PYE_PAGE_TAG_SIZE];
    uint64_t flags; /* the caller's */
} pye_tree_entry;

/* Where the nodes are. Numbers count from 0 to pye_tree_num_nodes() - 1.
 * `load` gives where node `node` lies, which was stored before: `room` (4096 bytes, aligned to
 * PYE_TREE_ALIGN) that it filled, or memory of its own, which stays until the tree calls again.
 * `store` keeps the 4096 bytes at `sealed` as node `node`. `drop`, which may be NULL, says that the
 * node is not needed any more. A failing `load` or `store` returns a status, which the tree's
 * caller gets. */
typedef struct {
    void *context;
    pye_status (*load)(void *context, const uint8_t **at, uint8_t *room, uint64_t node);
    pye_status (*store)(void *context, uint64_t node, const uint8_t *sealed);
    void (*drop)(void *context, uint64_t node);
} pye_tree_storage;

typedef struct {
    uint64_t num_pages;    /* 1 … PYE_TREE_MAX_PAGES */
    uint32_t cache_nodes;  /* PYE_TREE_MIN_CACHE … PYE_TREE_MAX_CACHE; 0: PYE_TREE_CACHE */
    pye_epoch_key *key;    /* of the nodes, and of nothing else; the tree destroys it when it ends */
    pye_tree_storage storage;
} pye_tree_options;

typedef struct {
    uint64_t found;  /* a leaf that was wanted was in the cache */
    uint64_t loads;  /* nodes opened */
    uint64_t made;   /* nodes that were in no storage */
    uint64_t stores; /* nodes sealed */
    uint64_t drops;  /* nodes that became zero */
    uint32_t levels;
    uint32_t cache_nodes;
    uint32_t cached;
    uint32_t dirty; /* of these, changed since they were stored */
} pye_tree_stats;

/* pye_tree_size returns how much memory a tree takes, in bytes; 0 if the options are refused.
 * Of the cache only what was used is ever touched. */
size_t pye_tree_size(const pye_tree_options *options);

/* pye_tree_num_nodes returns how many nodes the storage of so many pages has to hold; 0 if there
 * may not be so many. */
uint64_t pye_tree_num_nodes(uint64_t num_pages);

/* pye_tree_init makes an empty tree in memory of pye_tree_size() bytes aligned to PYE_TREE_ALIGN.
 * Nobody else may write there, and a forked child must not get it (MADV_WIPEONFORK); it holds no
 * secret. PYE_E_ARGUMENT, PYE_E_ALIGNMENT. */
PYE_MUST_USE pye_status pye_tree_init(pye_tree *tree, const pye_tree_options *options);

/* pye_tree_destroy destroys the key and empties the cache. Later calls give PYE_E_CLOSED. NULL is
 * allowed. */
void pye_tree_destroy(pye_tree *tree);

/* Everything below also gives PYE_E_STATE (memory wiped in a forked child), PYE_E_CLOSED,
 * PYE_E_POISONED, PYE_E_AUTH, PYE_E_LIMIT (no further epoch: the tree is destroyed; or more is
 * prepared than the cache has room for), and the storage's own statuses. */

/* pye_tree_get reads `num` consecutive entries from page `first`. On failure all are zero. */
PYE_MUST_USE pye_status pye_tree_get(pye_tree *tree, pye_tree_entry *entries, uint64_t first,
                                     size_t num);

/* pye_tree_put writes `num` consecutive entries. On failure, those that come first may have been
 * written; if the pages were prepared, it can not fail but for wrong arguments or a tree that is
 * dead. An entry of version 0 is put as zeroes. */
PYE_MUST_USE pye_status pye_tree_put(pye_tree *tree, const pye_tree_entry *entries, uint64_t first,
                                     size_t num);

/* pye_tree_clear puts nothing to `num` consecutive pages. What has no entries is passed over, so
 * that giving back a large range costs what was in use of it. */
PYE_MUST_USE pye_status pye_tree_clear(pye_tree *tree, uint64_t first, uint64_t num);

/* pye_tree_get_many and pye_tree_put_many do the same for pages anywhere; neighbours of one leaf
 * that follow each other cost one look. */
PYE_MUST_USE pye_status pye_tree_get_many(pye_tree *tree, pye_tree_entry *entries,
                                          const uint64_t *pages, size_t num);
PYE_MUST_USE pye_status pye_tree_put_many(pye_tree *tree, const pye_tree_entry *entries,
                                          const uint64_t *pages, size_t num);

/* pye_tree_prepare brings the leaves of `num` pages into the cache, all at once, and keeps them
 * there until pye_tree_release or the next pye_tree_prepare: to be called before pages are sealed,
 * so that their versions can be put for certain. If it fails, nothing is kept. */
PYE_MUST_USE pye_status pye_tree_prepare(pye_tree *tree, const uint64_t *pages, size_t num);
void pye_tree_release(pye_tree *tree);

/* pye_tree_trim lets all but `nodes` nodes leave the cache; those that were changed are stored.
 * PYE_E_LIMIT if more are prepared. */
PYE_MUST_USE pye_status pye_tree_trim(pye_tree *tree, uint32_t nodes);

/* pye_tree_read_stats fills `stats`, of a dead tree, too. */
void pye_tree_read_stats(const pye_tree *tree, pye_tree_stats *stats);

/* pye_tree_skip is pye_epoch_skip for the key of the nodes. */
PYE_MUST_USE pye_status pye_tree_skip(pye_tree *tree, uint64_t next);

/* A storage in memory of pye_tree_num_nodes() * 4096 bytes at `base`, such as a mapping of which
 * only what was written is there. `drop` is left to the caller, who knows how to give back. */
void pye_tree_in_memory(pye_tree_storage *storage, uint8_t *base);

#endif
