/* pager.h - the private side of a heap, for the files that make it up: pager.c (its life),
 * pager_map.c (mappings), pager_bring.c (faults, pages in), pager_evict.c (pages out), pager_file.c
 * (cold pages in a file), pager_tree.c (versions in a tree), pager_range.c (explicit operations),
 * pager_help.c (a second thread), pager_end.c (poisoned, closed). heap.h says what holds.
 *
 * All of a heap's own data lies in one mapping that a fork wipes: in a child `live` reads 0. */
#ifndef PYE_SRC_LINUX_PAGER_H
#define PYE_SRC_LINUX_PAGER_H

#include "page/heap_meta.h"
#include "page/heap_queue.h"
#include "page/heap_window.h"
#include "pyenclave/epoch.h"
#include "pyenclave/heap.h"
#include "pyenclave/page.h"

#include <stdatomic.h>
#include <sys/uio.h>

/* Most pages that are taken out of the view in one step. Room is made for so many at once, so that
 * fewer than one fault in a hundred pays for it. */
#define PAGER_BATCH 128
/* Zero pages of an ended heap that stay shown at a time. An instruction touches four at most; a gather
 * more, but it goes on where it faulted. */
#define PAGER_ZEROS 8
/* Those that are shown for one instruction, of all threads; a gather of one may touch 32. */
#define PAGER_STEPS 64

/* Pages from which on a helper is offered half of them: else handing over takes longer. A test has
 * fewer. */
#ifndef PAGER_SHARED
#define PAGER_SHARED 32
#endif

/* A part of a step, as a helper is given it: pages from `first` on. */
typedef struct pager_part {
    pye_status (*work)(pye_heap *heap, const struct pager_part *part);
    pye_page_key *key;
    uint32_t first;
    uint32_t num;
    int clean;
} pager_part;

/* A zero page that an instruction of `owner` touches. */
typedef struct {
    uintptr_t owner; /* 0: none */
    uint32_t page;
} pager_step;

typedef struct {
    _Atomic uint32_t state; /* pager_help.c */
    _Atomic uint32_t leave;
    _Atomic uint32_t hired;
    pager_part part;
    pye_status status; /* of the part, and its errno */
    int32_t error;
} pager_help;

struct pye_heap {
    uint64_t live;
    _Atomic uint32_t lock;  /* pager_lock.h */
    _Atomic uint32_t ended; /* a status: PYE_OK, PYE_E_POISONED or PYE_E_CLOSED */
    pye_status poison;      /* why; written before `ended` */
    uint32_t poison_page;
    int32_t poison_errno; /* 0: no system call failed */
    uint8_t *view;
    uint8_t *alias; /* NULL once the heap has ended */
    uint32_t num_pages;
    uint32_t batch; /* pages evicted at once, at most PAGER_BATCH */
    uint32_t mechanism;
    int32_t uffd;
    int32_t pidfd; /* of this process */
    int lists;     /* the kernel takes lists of pages to hide */
    int32_t fd;    /* the file of cold pages; -1: they stay in their frames */
    int tracks;    /* pages are shown for reading first, so that unchanged ones are known */
    uint32_t locks;          /* PYE_HEAP_LOCK_ */
    int locks_alias;         /* PYE_HEAP_LOCK_ALL by way of the alias, not of the view */
    uint32_t require_locked;
    pye_epoch_key *key;
    size_t size; /* of the mapping that this lies in */
    heap_queue queue;
    heap_window window;
    heap_window writes; /* of first writes to pages that were shown for reading */
    heap_meta meta; /* versions and tags of each page; version 0: it was never sealed, so it is zeros */
    pye_tree *tree; /* behind it, or NULL; pager_tree.c */
    size_t tree_size;
    pye_epoch_key *tree_key;
    uint8_t *nodes; /* the tree's storage: not trusted */
    size_t nodes_size;
    pye_heap_stats stats;
    pager_help help;
    uint32_t zeros[PAGER_ZEROS]; /* pages that stay shown since the heap ended; page + 1 */
    uint32_t next_zero;
    pager_step steps[PAGER_STEPS];
    uint32_t victims[PAGER_BATCH];
    uint32_t sorted[PAGER_BATCH]; /* those of a batch that are dropped, then those that are sealed */
    pye_page_job jobs[PAGER_BATCH];
    struct iovec runs[PAGER_BATCH];
};

static inline uint8_t *pager_frame(const pye_heap *heap, uint32_t page)
{
    return heap->alias + (size_t)page * PYE_PAGE_SIZE;
}

static inline uint8_t *pager_place(const pye_heap *heap, uint32_t page)
{
    return heap->view + (size_t)page * PYE_PAGE_SIZE;
}

/* SGX's type of an ordinary page, readable and writable. */
static inline pye_page_info pager_info(uint32_t page)
{
    return (pye_page_info){.address = (uint64_t)page * PYE_PAGE_SIZE, .flags = 3, .type = 2};
}

/* ---- pager_map.c: each with the lock held ---- */

/* pager_map makes the frames, the alias, and the view with nothing in it. On failure what there is
 * is left for pager_unmap. */
PYE_MUST_USE pye_status pager_map(pye_heap *heap, uint32_t mechanism);
void pager_unmap(pye_heap *heap);
/* pager_show maps frames into the view, for reading only if `clean`. They may be there already. */
PYE_MUST_USE pye_status pager_show(pye_heap *heap, uint32_t page, uint32_t num, int clean);
/* pager_show_zero does so for pages without frames, which come into being as zeros. */
PYE_MUST_USE pye_status pager_show_zero(pye_heap *heap, uint32_t page, uint32_t num, int clean);
/* pager_populate makes the frames of pages that have none. */
PYE_MUST_USE pye_status pager_populate(pye_heap *heap, uint32_t page, uint32_t num);
/* pager_unprotect lets pages that were shown for reading be written. */
PYE_MUST_USE pye_status pager_unprotect(pye_heap *heap, uint32_t page, uint32_t num);
/* pager_hide takes pages (at most PAGER_BATCH) out of the view: when it returns PYE_OK, no
 * processor can reach them there. */
PYE_MUST_USE pye_status pager_hide(pye_heap *heap, const uint32_t *pages, uint32_t num);
/* pager_punch gives the frames of pages back, hiding the pages. */
PYE_MUST_USE pye_status pager_punch(pye_heap *heap, uint32_t page, uint32_t num);
/* pager_remove gives the frames of hidden pages back. */
PYE_MUST_USE pye_status pager_remove(pye_heap *heap, uint32_t page, uint32_t num);
/* pager_reserve puts a reservation without access in the place of the view. */
PYE_MUST_USE pye_status pager_reserve(pye_heap *heap);
/* pager_drop_frames gives back the alias and with it all frames. */
void pager_drop_frames(pye_heap *heap);
/* pager_zero_page and pager_zero_gone let a page of a reserved view be zeros, and be absent. */
PYE_MUST_USE pye_status pager_zero_page(pye_heap *heap, uint32_t page);
void pager_zero_gone(pye_heap *heap, uint32_t page);

/* ---- pager.c ---- */

/* pager_new_key makes a key of fresh randomness, which nobody else ever has. */
PYE_MUST_USE pye_status pager_new_key(pye_epoch_key **key);
void pager_free_key(pye_epoch_key *key);

/* ---- pager_tree.c ---- */

/* pager_tree_new puts the heap's versions into a tree. On failure what there is is left for
 * pager_tree_free. */
PYE_MUST_USE pye_status pager_tree_new(pye_heap *heap, uint32_t cache_nodes, int in_file);
void pager_tree_free(pye_heap *heap);

/* ---- pager_bring.c ---- */

/* pager_look makes the versions of pages readable (heap_meta.h). On failure the heap has ended. */
PYE_MUST_USE pye_status pager_look(pye_heap *heap, uint32_t page, uint32_t num);

/* pager_bring makes the `num` pages from `page` on resident and shows them; none is, all are cold
 * or all are zeros, there is room, and they were looked at. `write`: they may be written at once;
 * `passing`: by a sequence (heap_queue.h). On failure the heap has ended. */
PYE_MUST_USE pye_status pager_bring(pye_heap *heap, uint32_t page, uint32_t num, int write,
                                    int passing);
/* pager_changes lets resident pages be written, and notes that they may have changed. */
PYE_MUST_USE pye_status pager_changes(pye_heap *heap, uint32_t page, uint32_t num);
/* pager_same returns how many of the `num` pages from `page` on, which were looked at, are not
 * resident and cold, or not resident and zeros, as the first is. */
uint32_t pager_same(const pye_heap *heap, uint32_t page, uint32_t num);
/* ---- pager_evict.c ---- */

/* pager_evict seals and hides resident, unpinned pages (at most PAGER_BATCH); `noted`: to make room,
 * so that it matters whether they come back. On failure the heap has ended. */
PYE_MUST_USE pye_status pager_evict(pye_heap *heap, const uint32_t *pages, uint32_t num, int noted);
/* pager_make_room evicts old pages until `num` may be brought, and a batch at least. PYE_E_LIMIT:
 * too many are pinned. */
PYE_MUST_USE pye_status pager_make_room(pye_heap *heap, uint32_t num);

/* ---- pager_file.c ---- */

/* pager_file_read makes frames and reads pages into them. PYE_E_AUTH: the file is too short. */
PYE_MUST_USE pye_status pager_file_read(pye_heap *heap, uint32_t page, uint32_t num);
PYE_MUST_USE pye_status pager_file_write(pye_heap *heap, const uint32_t *pages, uint32_t num);
/* pager_file_drop gives the frames of pages back, which are in the file. */
PYE_MUST_USE pye_status pager_file_drop(pye_heap *heap, const uint32_t *pages, uint32_t num);
/* pager_file_forget gives back what pages take in the file. */
void pager_file_forget(const pye_heap *heap, uint64_t page, uint64_t num);
/* pager_file_get and pager_file_put move the bytes at the place of a page, or behind the last one. */
PYE_MUST_USE pye_status pager_file_get(const pye_heap *heap, uint8_t *out, size_t size,
                                       uint64_t page);
PYE_MUST_USE pye_status pager_file_put(const pye_heap *heap, const uint8_t *in, size_t size,
                                       uint64_t page);

/* ---- pager_help.c: with the lock held ---- */

/* pager_offer offers the heap's helper a part and returns 1; 0 if there is none. It must be collected:
 * pager_collect returns how it went, whoever did it, with errno. */
int pager_offer(pye_heap *heap, const pager_part *part);
PYE_MUST_USE pye_status pager_collect(pye_heap *heap);

/* ---- pager_end.c ---- */

/* pager_poison ends the heap because of `why` and returns PYE_E_POISONED. */
PYE_MUST_USE pye_status pager_poison(pye_heap *heap, pye_status why, uint32_t page);
/* pager_end hides and wipes everything; `status` is what the heap answers from now on. */
void pager_end(pye_heap *heap, pye_status status);
/* pager_ended_fault shows a zero page of an ended heap, which stays, and returns its status. */
PYE_MUST_USE pye_status pager_ended_fault(pye_heap *heap, uint32_t page);

#endif
