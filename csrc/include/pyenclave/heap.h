/* heap.h - sealed memory: an address range of which only a bounded part is plaintext at a time.
 *
 * The pages of a heap lie in a memory file without a name that is mapped twice. Users see the
 * *view*; the pager works in the *alias*, which nobody else knows. A cold page is ciphertext in its
 * own frame and absent from the view. Who touches it has a fault (SIGBUS, or SIGSEGV where the
 * mechanism is PYE_HEAP_MPROTECT); the binding's signal handler calls pye_heap_fault, which opens
 * the page in place through the alias, compares its tag, and only then maps it into the view.
 * Eviction takes pages out of the view first and seals them in place afterwards. No more than
 * `resident_pages` are plaintext at any moment.
 *
 * Versions and tags are kept in ordinary memory of the process; beyond `tree_above` pages of
 * capacity in a version tree (tree.h), of which the process keeps a cache and the root. With a file,
 * cold pages are in it and not in memory; those that nobody has changed since they were opened are
 * dropped without being sealed again.
 *
 * A page whose tag does not fit *poisons* the heap: nothing of it is in the view any more, its
 * plaintext is wiped and its key destroyed. From then on, as after pye_heap_close, whoever touches
 * the range finds zeros and pye_heap_fault says why, again and again: only a few zero pages are
 * shown at a time, and where the caller can run single instructions each for one of them.
 *
 * Every function may be called by several threads at once, pye_heap_new and pye_heap_free
 * excepted. None may be called from a signal handler but pye_heap_fault, pye_heap_zeros and
 * pye_heap_stepped. A forked child has neither the pages nor the key: there every function gives PYE_E_FORKED.
 *
 * A system call that is given a cold page fails with EFAULT; it does not see ciphertext.
 * Prefetching is not enough to prevent that, pinning is. What keeps frames beyond the access itself
 * (O_DIRECT, io_uring, vmsplice, a device) needs the pin until it has ended: else it reads
 * ciphertext, and what it writes poisons the heap.
 *
 * What the process must not do: close the heap's descriptors under it (closefrom, os.closerange).
 * Without the one of userfaultfd the view is ordinary memory, and cold pages read as ciphertext.
 * Nor block SIGBUS or SIGSEGV in a thread that touches a heap: the kernel ends the process then.
 */
#ifndef PYENCLAVE_HEAP_H
#define PYENCLAVE_HEAP_H

#include "pyenclave/base.h"

#define PYE_HEAP_PAGE_SIZE 4096
#define PYE_HEAP_MIN_RESIDENT 64
/* Pages that cannot be pinned: what instructions need that touch several pages at once. */
#define PYE_HEAP_UNPINNED 32
/* 2^31 pages: 8 TiB. */
#define PYE_HEAP_MAX_PAGES 2147483648
/* Most pages that one fault brings. */
#define PYE_HEAP_MAX_WINDOW 256
/* Descriptors that a heap may have. */
#define PYE_HEAP_FDS 3
/* tree_above of who has no reason for another: 64 GiB, of which 384 MiB are versions and tags. */
#define PYE_HEAP_TREE_ABOVE 16777216

/* How pages are shown and hidden. */
#define PYE_HEAP_AUTO 0        /* userfaultfd where the kernel lets us, else mprotect */
#define PYE_HEAP_USERFAULTFD 1
#define PYE_HEAP_MPROTECT 2

/* How pages are kept out of swap while they are plaintext. */
#define PYE_HEAP_LOCK_NONE 0  /* they are not: RLIMIT_MEMLOCK has no room for the capacity */
#define PYE_HEAP_LOCK_ALL 1   /* by one lock; where there is no swap, of ciphertext too */
#define PYE_HEAP_LOCK_SHOWN 2 /* each while it is shown, in two system calls more */

/* What pye_heap_fault is told. */
#define PYE_FAULT_WRITE 1    /* the access was a write */
#define PYE_FAULT_UNMAPPED 2 /* nothing was mapped there (SEGV_MAPERR) */
#define PYE_FAULT_EXECUTE 4 /* an instruction was to be fetched: never a heap's matter */
#define PYE_FAULT_SEGMENT 8 /* it was SIGSEGV: a view of userfaultfd gives it once it has ended */
/* Of a heap that has ended nothing is shown: the caller goes on with pye_heap_zeros. */
#define PYE_FAULT_TELL 32
/* The frame was lost (BUS_MCEERR_AR), or a protection key forbids the access: never a heap's. */
#define PYE_FAULT_FOREIGN 16

typedef struct pye_heap pye_heap;

typedef struct {
    uint64_t capacity_pages;
    uint64_t resident_pages;
    uint32_t mechanism;  /* PYE_HEAP_ */
    uint32_t read_ahead; /* most pages a fault brings; 1: none ahead, 0: PYE_HEAP_MAX_WINDOW */
    int32_t fd; /* a file for the cold pages, page i at 4096 * (1 + i), the nodes of the version tree
                 * behind them; the heap takes a descriptor of
                 * its own. -1: they stay in memory */
    uint32_t require_locked; /* PYE_E_DENIED unless pages can be locked while they are shown */
    uint64_t tree_above; /* capacity, in pages, above which versions are in a tree */
    uint32_t tree_cache; /* nodes that it keeps in memory; 0: PYE_TREE_CACHE. It may keep more during
                          * a batch of evictions. */
} pye_heap_options;

typedef struct {
    uint64_t faults;       /* of user code that were served */
    uint64_t write_faults; /* those of them that were known to be writes */
    uint64_t zero_pages;   /* pages that were shown for the first time, as zeros */
    uint64_t pages_in;     /* pages opened */
    uint64_t pages_out;    /* pages sealed */
    uint64_t reseals;      /* those of them that had been sealed before */
    uint64_t evictions;    /* pages taken out of the view */
    uint64_t batches;      /* in so many steps */
    uint64_t clean_drops;  /* evicted without sealing, because they had not changed */
    uint64_t read_ahead;   /* pages brought before anyone touched them */
    uint64_t read_ahead_hits; /* those of them that a sequence of accesses went on beyond */
    uint64_t prefetched;   /* pages brought by pye_heap_prefetch and pye_heap_pin */
    uint64_t discarded;    /* pages freed */
    uint64_t resident;     /* pages that are plaintext now */
    uint64_t resident_peak;
    uint64_t resident_limit;
    uint64_t pinned;       /* pages that are pinned now */
    uint64_t locked;       /* resident pages that cannot reach swap */
    uint64_t capacity;     /* pages */
    uint64_t tree_levels;  /* of the version tree; 0: there is none */
    uint64_t nodes_in;     /* nodes of the tree opened */
    uint64_t nodes_out;    /* nodes sealed */
    uint64_t helped;       /* pages that a helper opened */
    uint64_t metadata_bytes; /* address space of versions, tags and queues; used as it is touched */
} pye_heap_stats;

/* pye_heap_new makes a heap of `capacity_pages` zero pages under a key of its own. Failures:
 * PYE_E_ARGUMENT (sizes, options), PYE_E_UNSUPPORTED (no such mechanism here), PYE_E_DENIED,
 * PYE_E_NO_MEMORY, PYE_E_RANDOM, PYE_E_OS; then `out` is NULL. */
PYE_MUST_USE pye_status pye_heap_new(pye_heap **out, const pye_heap_options *options);

/* pye_heap_close hides and wipes every page and destroys the key. The address range stays
 * reserved; accesses to it find zeros. It may be called twice. */
PYE_MUST_USE pye_status pye_heap_close(pye_heap *heap);

/* pye_heap_conceal hides the zeros that were shown since the heap ended, so that the next access is
 * noticed as the first was; for who was told of it. */
void pye_heap_conceal(pye_heap *heap);

/* pye_heap_free closes the heap and gives its address range back. Nobody may use it then, nor
 * touch the range. NULL, and a heap of another process, are nothing to do. */
void pye_heap_free(pye_heap *heap);

/* pye_heap_live returns 1 in the process that made the heap (closed or not), 0 in a forked child.
 * One load. */
int pye_heap_live(const pye_heap *heap);

/* pye_heap_child closes the descriptors of `heap` that a forked child has inherited; for a handler
 * of pthread_atfork, with what pye_heap_descriptors gave before. */
void pye_heap_child(const int32_t fds[PYE_HEAP_FDS]);
void pye_heap_descriptors(const pye_heap *heap, int32_t fds[PYE_HEAP_FDS]);

/* pye_heap_base returns the address of the view. */
void *pye_heap_base(const pye_heap *heap);
/* pye_heap_mechanism returns which one was taken, pye_heap_locks how pages are locked. */
uint32_t pye_heap_mechanism(const pye_heap *heap);
uint32_t pye_heap_locks(const pye_heap *heap);

/* pye_heap_fault serves an access to `address` that failed. It is async-signal-safe as long as no
 * signal can come while it runs that touches the heap (the handler blocks them all), keeps errno,
 * and allocates nothing. PYE_OK: the access may be repeated. PYE_E_POISONED, PYE_E_CLOSED: it may
 * be repeated too, and will find zeros. PYE_E_FORKED: so it may in this child. PYE_E_ARGUMENT: the
 * fault is not of this heap. */
PYE_MUST_USE pye_status pye_heap_fault(pye_heap *heap, uintptr_t address, uint32_t flags);

/* pye_heap_zeros shows the page of zeros at `address` of a heap that has ended (PYE_E_STATE: it has
 * not). `owner` is 0, or any number that no other thread gives: then the page is shown until
 * pye_heap_stepped, which must follow when the thread has run one instruction. It may touch several
 * pages, one fault after the other. PYE_E_LIMIT: too many are shown so; it stays, as with 0, until
 * others are shown or pye_heap_conceal. PYE_E_ARGUMENT: it cannot be shown.
 *
 * pye_heap_stepped hides the pages of `owner`, but those that other threads' instructions touch too.
 * `stay`: they stay instead as with 0, but a page beside such a one takes its place, so that who goes
 * through an array leaves one. Both are async-signal-safe as pye_heap_fault is. */
PYE_MUST_USE pye_status pye_heap_zeros(pye_heap *heap, uintptr_t address, uintptr_t owner);
void pye_heap_stepped(pye_heap *heap, uintptr_t owner, int stay);

/* The following take whole pages: `first` and `num` that reach beyond the capacity give
 * PYE_E_ARGUMENT. After poisoning they give PYE_E_POISONED, after closing PYE_E_CLOSED. */

/* pye_heap_prefetch shows pages, as many from the first on as there is room for without hiding one
 * of them again. `out_shown`, which may be NULL, is how many were brought. */
PYE_MUST_USE pye_status pye_heap_prefetch(pye_heap *heap, uint64_t *out_shown, uint64_t first,
                                          uint64_t num);
/* pye_heap_evict seals and hides the pages that are resident and not pinned. */
PYE_MUST_USE pye_status pye_heap_evict(pye_heap *heap, uint64_t *out_evicted, uint64_t first,
                                       uint64_t num);
/* pye_heap_pin shows pages and keeps them so until pye_heap_unpin was called as often. All or none:
 * PYE_E_LIMIT if more than resident_pages - PYE_HEAP_UNPINNED would be pinned. */
PYE_MUST_USE pye_status pye_heap_pin(pye_heap *heap, uint64_t first, uint64_t num);
/* pye_heap_unpin gives PYE_E_STATE, and does nothing, if one of the pages is not pinned. */
PYE_MUST_USE pye_status pye_heap_unpin(pye_heap *heap, uint64_t first, uint64_t num);
/* pye_heap_discard frees pages: they are zeros when they are touched again. PYE_E_BUSY, and nothing
 * is done, if one of them is pinned. */
PYE_MUST_USE pye_status pye_heap_discard(pye_heap *heap, uint64_t first, uint64_t num);

/* A *helper* is a thread that is lent to a heap: of many pages that are brought at once it opens
 * half, whoever asked or had the fault. pye_heap_hire says that one comes (PYE_E_BUSY: there is
 * one), pye_heap_help is what it does until pye_heap_dismiss was called, with its signals blocked.
 * It sleeps when there is nothing to do. Every pye_heap_hire needs a pye_heap_help, which must have
 * returned before pye_heap_free. */
PYE_MUST_USE pye_status pye_heap_hire(pye_heap *heap);
void pye_heap_help(pye_heap *heap);
void pye_heap_dismiss(pye_heap *heap);

/* pye_heap_poisoned returns why the heap was poisoned (PYE_E_AUTH: a page was changed or replaced, or
 * the file is too short; PYE_E_OS, PYE_E_DENIED, PYE_E_NO_MEMORY: the system failed, with `out_errno`;
 * PYE_E_LIMIT), or PYE_OK. `out_page` is the first of the pages among which it was noticed. */
pye_status pye_heap_poisoned(const pye_heap *heap, uint64_t *out_page, int32_t *out_errno);

/* pye_heap_stats_read copies the counters. */
PYE_MUST_USE pye_status pye_heap_stats_read(pye_heap *heap, pye_heap_stats *out);

/* For tests: the frame of a page in the alias (NULL once the heap has ended), its version and tag,
 * overwriting them, giving up versions of the key (epoch.h says what they are), and the nodes of
 * the version tree as they lie in its storage (NULL: there is none). */
uint8_t *pye_heap_frame(const pye_heap *heap, uint64_t page);
PYE_MUST_USE pye_status pye_heap_meta(pye_heap *heap, uint64_t *out_version, uint8_t out_tag[16],
                                      uint64_t page);
PYE_MUST_USE pye_status pye_heap_set_meta(pye_heap *heap, uint64_t page, uint64_t version,
                                          const uint8_t tag[16]);
PYE_MUST_USE pye_status pye_heap_skip(pye_heap *heap, uint64_t next_version);
uint8_t *pye_heap_nodes(const pye_heap *heap, size_t *out_size);

#endif
