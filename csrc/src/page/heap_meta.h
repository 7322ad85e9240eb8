/* heap_meta.h - versions and tags of a heap's pages: in arrays of all pages, or in a version tree.
 *
 * The pager looks at a window of consecutive pages, and puts what it sealed in batches; which of
 * the two is behind that, it need not know. Not thread-safe: the heap's lock is held. */
#ifndef PYE_SRC_PAGE_HEAP_META_H
#define PYE_SRC_PAGE_HEAP_META_H

#include "pyenclave/page.h"
#include "pyenclave/tree.h"

/* Pages of a window, and of a batch. */
#define HEAP_META_WINDOW 256
#define HEAP_META_BATCH 128

typedef struct {
    /* Of the pages from `base` on; of all pages where there is no tree. */
    uint64_t *versions;
    uint8_t (*tags)[PYE_PAGE_TAG_SIZE];
    uint32_t base;
    uint32_t num;
    pye_tree *tree; /* NULL: arrays */
    uint32_t trim;  /* nodes that may stay in the cache after a batch; 0: as many as fit */
    uint64_t window_versions[HEAP_META_WINDOW];
    uint8_t window_tags[HEAP_META_WINDOW][PYE_PAGE_TAG_SIZE];
    uint64_t pages[HEAP_META_BATCH];
    pye_tree_entry entries[HEAP_META_BATCH > HEAP_META_WINDOW ? HEAP_META_BATCH
                                                              : HEAP_META_WINDOW];
    pye_tree_entry batch[HEAP_META_BATCH];
} heap_meta;

/* heap_meta_arrays begins with zero arrays of `num` pages. */
void heap_meta_arrays(heap_meta *meta, uint64_t *versions, uint8_t (*tags)[PYE_PAGE_TAG_SIZE],
                      uint32_t num);

/* heap_meta_tree begins with a tree that is empty. */
void heap_meta_tree(heap_meta *meta, pye_tree *tree, uint32_t trim);

/* heap_meta_look makes the versions and tags of `num` pages (at most HEAP_META_WINDOW) readable,
 * until it is called again. The statuses are those of pye_tree_get. */
PYE_MUST_USE pye_status heap_meta_look(heap_meta *meta, uint32_t page, uint32_t num);

/* heap_meta_version and heap_meta_tag return those of a page that was looked at. */
static inline uint64_t heap_meta_version(const heap_meta *meta, uint32_t page)
{
    return meta->versions[page - meta->base];
}

static inline const uint8_t *heap_meta_tag(const heap_meta *meta, uint32_t page)
{
    return meta->tags[page - meta->base];
}

/* heap_meta_begin is called before `num` pages (at most HEAP_META_BATCH) are sealed: heap_meta_end
 * cannot fail then. It gives the place where each one's tag is to be written, and whether the page
 * was sealed before. */
PYE_MUST_USE pye_status heap_meta_begin(heap_meta *meta, const uint32_t *pages, uint32_t num);
uint8_t *heap_meta_place(heap_meta *meta, uint32_t i, uint32_t page);
int heap_meta_was(const heap_meta *meta, uint32_t i, uint32_t page);

/* heap_meta_end notes what was sealed. */
PYE_MUST_USE pye_status heap_meta_end(heap_meta *meta, const pye_page_job *jobs,
                                      const uint32_t *pages, uint32_t num);

/* heap_meta_clear notes that pages are zeros. */
PYE_MUST_USE pye_status heap_meta_clear(heap_meta *meta, uint32_t page, uint32_t num);

/* heap_meta_set overwrites one page's (tests). */
PYE_MUST_USE pye_status heap_meta_set(heap_meta *meta, uint32_t page, uint64_t version,
                                      const uint8_t tag[PYE_PAGE_TAG_SIZE]);

#endif
