/* tree_impl.h - the layout of a version tree, and its cache, which tree.c and tree_cache.c share. */
#ifndef PYE_SRC_PAGE_TREE_IMPL_H
#define PYE_SRC_PAGE_TREE_IMPL_H

#include "pyenclave/tree.h"

#define NO_SLOT UINT32_MAX

/* A node in the cache. A node is there only while its parent is: so what is sealed always finds
 * the place of its new version, and none leaves while a child is there. */
typedef struct {
    uint64_t node;     /* its number */
    uint32_t parent;   /* its slot; NO_SLOT: the topmost */
    uint32_t next;     /* in its bucket, or of the free ones */
    uint32_t pinned;   /* the preparation that keeps it, if it is the tree's; 0: none */
    uint16_t children; /* how many of its children are in the cache */
    uint8_t place;     /* which entry of the parent is its */
    uint8_t level;     /* 0: a leaf */
    uint8_t dirty;     /* changed since it was stored */
    uint8_t used;      /* wanted since the hand passed */
    uint8_t there;     /* in the cache */
} tree_slot;

_Static_assert(sizeof(tree_slot) <= 32, "two to a line of the cache");
_Static_assert(sizeof(pye_tree_entry) == 32, "docs/formats/heap.md");
_Static_assert(sizeof(pye_tree_entry) * PYE_TREE_FANOUT == PYE_PAGE_SIZE, "a node is a page");

struct pye_tree {
    uint32_t state; /* memory wiped in a forked child is zero, and no state of a tree */
    uint32_t levels;
    uint32_t cache_nodes;
    uint32_t bucket_mask;
    uint64_t num_pages;
    uint64_t base[PYE_TREE_LEVELS]; /* number of the first node of a level */
    pye_tree_entry root;            /* of the topmost node: what everything rests on */
    pye_tree_storage storage;
    /* the cache */
    uint32_t num_slots; /* that were ever used: the memory of the others is not touched */
    uint32_t cached;
    uint32_t dirty;
    uint32_t free;
    uint32_t hand;
    uint32_t pin; /* the preparation that holds now; 0: none */
    uint32_t last_pin;
    uint32_t last; /* slot of the leaf that was wanted last, or NO_SLOT */
    uint64_t last_leaf;
    pye_tree_stats stats;
    pye_epoch_key *key;
    /* all within the tree's own memory */
    tree_slot *slots;
    uint32_t *buckets;
    uint8_t *scratch; /* a node sealed */
    uint8_t *room;    /* where a storage may put a node */
    uint8_t *nodes;
};

/* tree_entries returns the entries of the node in a slot. */
static inline pye_tree_entry *tree_entries(const pye_tree *tree, uint32_t slot)
{
    return (pye_tree_entry *)(void *)(tree->nodes + (size_t)slot * PYE_PAGE_SIZE);
}

/* tree_entry_of returns the entry that belongs to the node in a slot. */
static inline pye_tree_entry *tree_entry_of(pye_tree *tree, const tree_slot *slot)
{
    return slot->parent == NO_SLOT ? &tree->root
                                   : &tree_entries(tree, slot->parent)[slot->place];
}

static inline void tree_mark_dirty(pye_tree *tree, uint32_t slot)
{
    if (slot != NO_SLOT && !tree->slots[slot].dirty) {
        tree->slots[slot].dirty = 1;
        tree->dirty++;
    }
}

/* tree_find returns the slot of a node, or NO_SLOT. */
uint32_t tree_find(const pye_tree *tree, uint64_t node);

/* tree_bring loads the child at `index` of its level, whose parent is in slot `parent` (NO_SLOT: it
 * is the topmost), and gives its slot. Its parent stays. */
PYE_MUST_USE pye_status tree_bring(pye_tree *tree, uint32_t *slot, uint32_t level, uint64_t index,
                                   uint32_t parent);

/* tree_evict_one lets one node leave the cache, but not that of slot `keep`. */
PYE_MUST_USE pye_status tree_evict_one(pye_tree *tree, uint32_t keep);

/* tree_fail ends the tree with `state`, for good. */
void tree_fail(pye_tree *tree, int poisoned);

#endif
