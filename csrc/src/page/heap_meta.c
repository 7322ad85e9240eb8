/* heap_meta.c - versions and tags of a heap's pages: in arrays of all pages, or in a version tree. */
#include "page/heap_meta.h"
#include "base/check.h"

#include <string.h>

void heap_meta_arrays(heap_meta *meta, uint64_t *versions, uint8_t (*tags)[PYE_PAGE_TAG_SIZE],
                      uint32_t num)
{
    meta->versions = versions;
    meta->tags = tags;
    meta->base = 0;
    meta->num = num;
    meta->tree = NULL;
}

void heap_meta_tree(heap_meta *meta, pye_tree *tree, uint32_t trim)
{
    meta->versions = meta->window_versions;
    meta->tags = meta->window_tags;
    meta->base = meta->num = 0;
    meta->tree = tree;
    meta->trim = trim;
}

static inline int in_window(const heap_meta *meta, uint32_t page)
{
    return page >= meta->base && page - meta->base < meta->num;
}

/* show puts an entry into the window, if its page is there. */
static void show(heap_meta *meta, uint32_t page, const pye_tree_entry *entry)
{
    if (in_window(meta, page)) {
        meta->versions[page - meta->base] = entry->version;
        memcpy(meta->tags[page - meta->base], entry->tag, PYE_PAGE_TAG_SIZE);
    }
}

pye_status heap_meta_look(heap_meta *meta, uint32_t page, uint32_t num)
{
    if (meta->tree == NULL || (in_window(meta, page) && num <= meta->num - (page - meta->base))) {
        return PYE_OK;
    }
    meta->num = 0;
    PYE_TRY(pye_tree_get(meta->tree, meta->entries, page, num));
    meta->base = page;
    meta->num = num;
    for (uint32_t i = 0; i < num; i++) {
        meta->versions[i] = meta->entries[i].version;
        memcpy(meta->tags[i], meta->entries[i].tag, PYE_PAGE_TAG_SIZE);
    }
    return PYE_OK;
}

pye_status heap_meta_begin(heap_meta *meta, const uint32_t *pages, uint32_t num)
{
    if (meta->tree == NULL) {
        return PYE_OK;
    }
    for (uint32_t i = 0; i < num; i++) {
        meta->pages[i] = pages[i];
    }
    PYE_TRY(pye_tree_prepare(meta->tree, meta->pages, num));
    return pye_tree_get_many(meta->tree, meta->batch, meta->pages, num);
}

uint8_t *heap_meta_place(heap_meta *meta, uint32_t i, uint32_t page)
{
    return meta->tree == NULL ? meta->tags[page] : meta->batch[i].tag;
}

int heap_meta_was(const heap_meta *meta, uint32_t i, uint32_t page)
{
    return (meta->tree == NULL ? meta->versions[page] : meta->batch[i].version) != 0;
}

pye_status heap_meta_end(heap_meta *meta, const pye_page_job *jobs, const uint32_t *pages,
                         uint32_t num)
{
    if (meta->tree == NULL) {
        for (uint32_t i = 0; i < num; i++) {
            meta->versions[pages[i]] = jobs[i].version;
        }
        return PYE_OK;
    }
    for (uint32_t i = 0; i < num; i++) {
        meta->batch[i].version = jobs[i].version;
        show(meta, pages[i], &meta->batch[i]);
    }
    const pye_status rc = pye_tree_put_many(meta->tree, meta->batch, meta->pages, num);
    pye_tree_release(meta->tree);
    return rc != PYE_OK || meta->trim == 0 ? rc : pye_tree_trim(meta->tree, meta->trim);
}

pye_status heap_meta_clear(heap_meta *meta, uint32_t page, uint32_t num)
{
    static const pye_tree_entry nothing = {0};

    if (meta->tree != NULL) {
        for (uint32_t i = 0; i < meta->num; i++) {
            if (meta->base + i >= page && meta->base + i - page < num) {
                show(meta, meta->base + i, &nothing);
            }
        }
        return pye_tree_clear(meta->tree, page, num);
    }
    for (uint32_t i = page; i < page + num; i++) {
        if (meta->versions[i] != 0) { /* not to touch memory that was never used */
            meta->versions[i] = 0;
        }
    }
    return PYE_OK;
}

pye_status heap_meta_set(heap_meta *meta, uint32_t page, uint64_t version,
                         const uint8_t tag[PYE_PAGE_TAG_SIZE])
{
    pye_tree_entry entry = {.version = version};

    memcpy(entry.tag, tag, sizeof(entry.tag));
    show(meta, page, &entry);
    if (meta->tree != NULL) {
        return pye_tree_put(meta->tree, &entry, page, 1);
    }
    return PYE_OK;
}
