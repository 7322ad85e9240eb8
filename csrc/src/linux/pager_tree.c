/* pager_tree.c - the version tree of a large heap: its memory, its key, and where its nodes lie. */
#define _GNU_SOURCE
#include "base/check.h"
#include "linux/sys.h"

#if defined(__linux__)

#include "linux/pager.h"
#include "pyenclave/linux.h"

#include <string.h>
#include <unistd.h>

/* Nodes that are needed for a batch to be prepared: each leaf, what is above it, the topmost, and
 * a way down besides. */
static uint32_t least_cache(uint64_t num_pages)
{
    uint32_t levels = 1;

    for (uint64_t nodes = num_pages / PYE_TREE_FANOUT; nodes > 0; nodes /= PYE_TREE_FANOUT) {
        levels++;
    }
    return (HEAP_META_BATCH + 1) * levels;
}

/* map_own maps zero memory that a child does not get. */
static pye_status map_own(void **out, size_t size, int wiped)
{
    void *const memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    PYE_REFUSE_IF(memory == MAP_FAILED, pye_os_status(errno));
    if (PYE_GUARD(madvise(memory, size, wiped ? MADV_WIPEONFORK : MADV_DONTFORK) != 0)) {
        (void)munmap(memory, size);
        return PYE_E_UNSUPPORTED;
    }
    *out = memory;
    return PYE_OK;
}

static void drop_node(void *context, uint64_t node)
{
    (void)madvise((uint8_t *)context + node * PYE_PAGE_SIZE, PYE_PAGE_SIZE, MADV_DONTNEED);
}

/* The nodes of a heap with a file lie behind its pages. */
static pye_status load_node(void *context, const uint8_t **at, uint8_t *room, uint64_t node)
{
    const pye_heap *const heap = context;

    *at = room;
    return pager_file_get(heap, room, PYE_PAGE_SIZE, heap->num_pages + node);
}

static pye_status store_node(void *context, uint64_t node, const uint8_t *sealed)
{
    const pye_heap *const heap = context;

    return pager_file_put(heap, sealed, PYE_PAGE_SIZE, heap->num_pages + node);
}

static void forget_node(void *context, uint64_t node)
{
    const pye_heap *const heap = context;

    pager_file_forget(heap, heap->num_pages + node, 1);
}

/* make_storage chooses where the nodes are: in the heap's file, or in memory that is not trusted. */
static pye_status make_storage(pye_heap *heap, pye_tree_storage *storage, int in_file)
{
    void *memory;

    if (in_file) {
        *storage = (pye_tree_storage){heap, load_node, store_node, forget_node};
        return PYE_OK;
    }
    heap->nodes_size = (size_t)pye_tree_num_nodes(heap->num_pages) * PYE_PAGE_SIZE;
    PYE_TRY(map_own(&memory, heap->nodes_size, 0));
    heap->nodes = memory;
    pye_tree_in_memory(storage, heap->nodes);
    storage->drop = drop_node;
    return PYE_OK;
}

pye_status pager_tree_new(pye_heap *heap, uint32_t cache_nodes, int in_file)
{
    const uint64_t num_pages = heap->num_pages;
    const uint32_t least = least_cache(num_pages);
    const uint32_t wanted = cache_nodes == 0 ? PYE_TREE_CACHE : cache_nodes;
    pye_tree_options options = {.num_pages = num_pages,
                                .cache_nodes = wanted < least ? least : wanted};
    void *memory;

    heap->tree_size = pye_tree_size(&options);
    PYE_TRY(map_own(&memory, heap->tree_size, 1));
    heap->tree = memory;
    PYE_TRY(make_storage(heap, &options.storage, in_file));
    PYE_TRY(pager_new_key(&heap->tree_key));
    options.key = heap->tree_key;
    heap_meta_tree(&heap->meta, heap->tree, wanted < least ? wanted : 0);
    return pye_tree_init(heap->tree, &options);
}

void pager_tree_free(pye_heap *heap)
{
    pager_free_key(heap->tree_key);
    if (heap->nodes != NULL) {
        (void)munmap(heap->nodes, heap->nodes_size);
    }
    if (heap->tree != NULL) {
        (void)munmap(heap->tree, heap->tree_size);
    }
}

#else
typedef int pye_pager_tree_is_for_linux; /* ISO C wants a declaration */
#endif
