/* tree_cache.c - the version tree's cache of nodes: who is there, who leaves, sealing and opening. */
#include "base/check.h"
#include "page/tree_impl.h"

#include <string.h>

#define NODE_TYPE 3 /* of SGX's page types, the one that holds versions */

static uint32_t *bucket_of(const pye_tree *tree, uint64_t node)
{
    return &tree->buckets[(node * UINT64_C(0x9e3779b97f4a7c15)) >> 32 & tree->bucket_mask];
}

uint32_t tree_find(const pye_tree *tree, uint64_t node)
{
    uint32_t slot = *bucket_of(tree, node);

    while (slot != NO_SLOT && tree->slots[slot].node != node) {
        slot = tree->slots[slot].next;
    }
    return slot;
}

static void unlink_slot(pye_tree *tree, uint32_t slot)
{
    uint32_t *at = bucket_of(tree, tree->slots[slot].node);

    while (*at != slot) {
        at = &tree->slots[*at].next;
    }
    *at = tree->slots[slot].next;
}

static pye_page_info info_of(const tree_slot *slot)
{
    const pye_page_info info = {slot->node * PYE_PAGE_SIZE, slot->level, NODE_TYPE};

    return info;
}

static int is_zero(const pye_tree_entry *entries)
{
    const uint8_t *bytes = (const uint8_t *)entries;

    for (size_t i = 0; i < PYE_PAGE_SIZE; i += 8) {
        uint64_t word;

        memcpy(&word, bytes + i, sizeof(word));
        if (word != 0) {
            return 0;
        }
    }
    return 1;
}

/* store_node seals a node that was changed, and notes its new version in its parent. */
static pye_status store_node(pye_tree *tree, uint32_t at)
{
    tree_slot *slot = &tree->slots[at];
    pye_tree_entry *entry = tree_entry_of(tree, slot);
    const pye_page_info info = info_of(slot);
    pye_tree_entry fresh = {0};
    pye_page_key *key;

    if (is_zero(tree_entries(tree, at))) {
        if (entry->version != 0 && tree->storage.drop != NULL) {
            tree->storage.drop(tree->storage.context, slot->node);
        }
        tree->stats.drops++;
    } else {
        pye_status rc = pye_epoch_to_seal(tree->key, &key, 1);
        if (rc == PYE_OK) {
            rc = pye_page_seal(key, tree->scratch, fresh.tag, &fresh.version,
                               (const uint8_t *)tree_entries(tree, at), &info);
        }
        if (PYE_GUARD(rc != PYE_OK)) {
            tree_fail(tree, 0);
            return rc;
        }
        PYE_TRY(tree->storage.store(tree->storage.context, slot->node, tree->scratch));
        tree->stats.stores++;
    }
    *entry = fresh;
    tree_mark_dirty(tree, slot->parent);
    slot->dirty = 0;
    tree->dirty--;
    return PYE_OK;
}

/* victim finds who leaves next: none that has children here, is prepared, or was wanted since the
 * hand came by last. */
static uint32_t victim(pye_tree *tree, uint32_t keep)
{
    for (uint64_t steps = 2 * (uint64_t)tree->num_slots; steps > 0; steps--) {
        const uint32_t at = tree->hand;
        tree_slot *slot = &tree->slots[at];

        tree->hand = at + 1 < tree->num_slots ? at + 1 : 0;
        if (!slot->there || slot->children > 0 || at == keep ||
            (tree->pin != 0 && slot->pinned == tree->pin)) {
            continue;
        }
        if (!slot->used) {
            return at;
        }
        slot->used = 0;
    }
    return NO_SLOT;
}

pye_status tree_evict_one(pye_tree *tree, uint32_t keep)
{
    const uint32_t at = victim(tree, keep);

    PYE_REFUSE_IF(at == NO_SLOT, PYE_E_LIMIT);
    tree_slot *slot = &tree->slots[at];
    if (slot->dirty) {
        PYE_TRY(store_node(tree, at));
    }
    if (slot->parent != NO_SLOT) {
        tree->slots[slot->parent].children--;
    }
    if (tree->last == at) {
        tree->last = NO_SLOT;
    }
    unlink_slot(tree, at);
    slot->there = 0;
    slot->next = tree->free;
    tree->free = at;
    tree->cached--;
    return PYE_OK;
}

/* take gives a slot that nobody uses. */
static pye_status take(pye_tree *tree, uint32_t *at, uint32_t keep)
{
    if (tree->free == NO_SLOT && tree->num_slots < tree->cache_nodes) {
        *at = tree->num_slots++;
        memset(&tree->slots[*at], 0, sizeof(tree->slots[*at]));
        return PYE_OK;
    }
    if (tree->free == NO_SLOT) {
        PYE_TRY(tree_evict_one(tree, keep));
    }
    *at = tree->free;
    tree->free = tree->slots[*at].next;
    return PYE_OK;
}

/* open_node fills a slot with what its parent's entry says. */
static pye_status open_node(pye_tree *tree, uint32_t at)
{
    const tree_slot *slot = &tree->slots[at];
    const pye_tree_entry *entry = tree_entry_of(tree, slot);
    const pye_page_info info = info_of(slot);
    uint8_t *out = (uint8_t *)tree_entries(tree, at);
    const uint8_t *in = NULL;
    pye_page_key *key;

    if (entry->version == 0) {
        memset(out, 0, PYE_PAGE_SIZE);
        tree->stats.made++;
        return PYE_OK;
    }
    PYE_TRY(tree->storage.load(tree->storage.context, &in, tree->room, slot->node));
    pye_status rc = pye_epoch_to_open(tree->key, &key, entry->version);
    if (rc == PYE_OK) {
        rc = pye_page_open(key, out, in, entry->tag, entry->version, &info);
    }
    if (PYE_GUARD(rc != PYE_OK)) {
        tree_fail(tree, rc == PYE_E_AUTH);
        return rc;
    }
    tree->stats.loads++;
    return PYE_OK;
}

pye_status tree_bring(pye_tree *tree, uint32_t *slot, uint32_t level, uint64_t index,
                      uint32_t parent)
{
    uint32_t at = NO_SLOT;

    PYE_TRY(take(tree, &at, parent));
    tree_slot *made = &tree->slots[at];
    made->node = tree->base[level] + index;
    made->parent = parent;
    made->pinned = 0;
    made->children = 0;
    made->place = (uint8_t)(index % PYE_TREE_FANOUT);
    made->level = (uint8_t)level;
    made->dirty = 0;
    made->used = 1;
    const pye_status rc = open_node(tree, at);
    if (PYE_GUARD(rc != PYE_OK)) {
        made->next = tree->free;
        tree->free = at;
        return rc;
    }
    uint32_t *bucket = bucket_of(tree, made->node);
    made->next = *bucket;
    *bucket = at;
    made->there = 1;
    tree->cached++;
    if (parent != NO_SLOT) {
        tree->slots[parent].children++;
    }
    *slot = at;
    return PYE_OK;
}
