/* extents.h - which ranges of a sealed heap are taken, with nothing of it inside the heap.
 *
 * Ranges of more than PYE_EXTENT_SMALL bytes are runs of whole pages, found in constant time by
 * segregated lists (two-level, as TLSF has them); smaller ones share pages of equal slots. Every
 * range begins at a multiple of 64 bytes. Free pages are always zero: who gives a range back gets
 * the pages that became free by it, empties them, and settles them. Until then they are nobody's.
 *
 * All metadata lies in memory that the caller gives (24 bytes a page, of which only pages at borders
 * of ranges are touched). No system calls, no allocation; the caller serializes. Offsets that come
 * back are checked: one that is no taken range is refused.
 */
#ifndef PYENCLAVE_EXTENTS_H
#define PYENCLAVE_EXTENTS_H

#include "pyenclave/base.h"

/* The largest range that shares a page with others, in bytes. */
#define PYE_EXTENT_SMALL 2048
/* Pages a heap may have: 16 TiB. */
#define PYE_EXTENT_MAX_PAGES 4294967294

typedef struct pye_extents pye_extents;

/* A range of whole pages, in bytes; nothing when length is 0. */
typedef struct {
    uint64_t offset;
    uint64_t length;
} pye_extent;

/* pye_extents_size returns the size in bytes of the metadata of `num_pages` pages, or 0 if that is
 * no size of a heap. */
uint64_t pye_extents_size(uint64_t num_pages);

/* pye_extents_init makes all of `num_pages` pages free, in zeroed memory of pye_extents_size()
 * bytes aligned to 8. Failures: PYE_E_ARGUMENT. */
PYE_MUST_USE pye_status pye_extents_init(pye_extents *extents, uint64_t num_pages);

/* pye_extents_take takes a range of at least `length` bytes and says where it is and how long.
 * Whole pages of it are zero, slots are not. Failures: PYE_E_LENGTH (0 bytes), PYE_E_LIMIT (no
 * free range is long enough). */
PYE_MUST_USE pye_status pye_extents_take(pye_extents *extents, uint64_t *offset, uint64_t *given,
                                         uint64_t length);

/* pye_extents_find returns the length of the range that begins at `offset`. Failures:
 * PYE_E_ARGUMENT: none begins there. */
PYE_MUST_USE pye_status pye_extents_find(const pye_extents *extents, uint64_t *length,
                                         uint64_t offset);

/* pye_extents_give gives the range at `offset` back. `freed` are the pages that became free: the
 * caller makes them zero and calls pye_extents_settle. Failures: PYE_E_ARGUMENT: no range begins
 * there, or it was given back before. */
PYE_MUST_USE pye_status pye_extents_give(pye_extents *extents, pye_extent *freed,
                                         uint64_t offset);

/* pye_extents_settle lets pages that were freed be taken again. Failures: PYE_E_ARGUMENT: they are
 * not what was freed. */
PYE_MUST_USE pye_status pye_extents_settle(pye_extents *extents, const pye_extent *freed);

/* pye_extents_resize makes the range at `offset` at least `length` bytes long without moving it.
 * `freed` as for pye_extents_give. Failures: PYE_E_LENGTH, PYE_E_ARGUMENT, PYE_E_LIMIT (it has no
 * room to grow there; nothing changed). */
PYE_MUST_USE pye_status pye_extents_resize(pye_extents *extents, uint64_t *given,
                                           pye_extent *freed, uint64_t offset, uint64_t length);

/* pye_extents_taken returns how many bytes are taken: given to callers, shared pages and pages that
 * are not settled counted whole. */
uint64_t pye_extents_taken(const pye_extents *extents);

/* pye_extents_largest returns the length of the longest range that could be taken now, in bytes. */
uint64_t pye_extents_largest(const pye_extents *extents);

#endif
