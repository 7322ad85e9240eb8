/* extents.c - which ranges of a sealed heap are taken: runs of pages, and slots of shared pages. */
#include "pyenclave/extents.h"

#include <string.h>

#include "base/check.h"
#include "pyenclave/page.h"

#define NONE UINT32_MAX
#define NUM_BINS 240 /* runs of 1..7 pages exactly, then eight bins for each power of two */
#define NUM_CLASSES 12
#define STEP 64 /* every range begins at a multiple of it */

/* What a page is. Only the first page of a run says so; its last page points back. */
enum { INSIDE, FREE, TAKEN, LEAVING, SHARED, LAST };

typedef struct {
    uint32_t length; /* of the run, in pages; at its first and its last page */
    uint32_t prev;   /* neighbours in the list of a bin (FREE) or of a class (SHARED, with room) */
    uint32_t next;
    uint8_t state;
    uint8_t class;   /* SHARED: index into `slot_size` */
    uint16_t used;   /* SHARED: slots that are taken */
    uint64_t slots;  /* SHARED: which */
} page;

struct pye_extents {
    uint64_t num_pages;
    uint64_t taken; /* pages that are not FREE */
    uint64_t filled[(NUM_BINS + 63) / 64]; /* bins that are not empty */
    uint32_t bin[NUM_BINS];
    uint32_t room[NUM_CLASSES]; /* shared pages with a free slot */
    page pages[];
};

_Static_assert(sizeof(page) == 24, "the header says 24 bytes a page");

static const uint16_t slot_size[NUM_CLASSES] = {64,  128, 192, 256,  320,  384,
                                                512, 640, 768, 1024, 1344, 2048};

uint64_t pye_extents_size(uint64_t num_pages)
{
    if (num_pages == 0 || num_pages > PYE_EXTENT_MAX_PAGES) {
        return 0;
    }
    return sizeof(pye_extents) + num_pages * sizeof(page);
}

/* ---- lists of free runs ---- */

/* bin_of returns the bin in which a run of `length` pages lies. */
static uint32_t bin_of(uint64_t length)
{
    if (length < 8) {
        return (uint32_t)length;
    }
    const uint32_t power = 63 - (uint32_t)__builtin_clzll(length);
    return (power - 2) * 8 + (uint32_t)((length >> (power - 3)) & 7);
}

/* set_run writes both ends of a run. */
static void set_run(pye_extents *e, uint32_t first, uint32_t length, uint8_t state)
{
    if (length > 1) {
        e->pages[first + length - 1] = (page){.length = length, .state = LAST};
    }
    e->pages[first] = (page){.length = length, .prev = NONE, .next = NONE, .state = state};
}

/* forget takes both ends of a run that becomes part of another. */
static void forget(pye_extents *e, uint32_t first)
{
    const uint32_t length = e->pages[first].length;
    e->pages[first + length - 1].state = INSIDE;
    e->pages[first].state = INSIDE;
}

static void link_page(pye_extents *e, uint32_t *head, uint32_t at)
{
    e->pages[at].prev = NONE;
    e->pages[at].next = *head;
    if (*head != NONE) {
        e->pages[*head].prev = at;
    }
    *head = at;
}

static void unlink_page(pye_extents *e, uint32_t *head, uint32_t at)
{
    const uint32_t prev = e->pages[at].prev;
    const uint32_t next = e->pages[at].next;
    if (prev != NONE) {
        e->pages[prev].next = next;
    } else {
        *head = next;
    }
    if (next != NONE) {
        e->pages[next].prev = prev;
    }
}

static void insert_free(pye_extents *e, uint32_t first, uint32_t length)
{
    const uint32_t bin = bin_of(length);
    set_run(e, first, length, FREE);
    link_page(e, &e->bin[bin], first);
    e->filled[bin / 64] |= UINT64_C(1) << (bin % 64);
}

static void remove_free(pye_extents *e, uint32_t first)
{
    const uint32_t bin = bin_of(e->pages[first].length);
    unlink_page(e, &e->bin[bin], first);
    if (e->bin[bin] == NONE) {
        e->filled[bin / 64] &= ~(UINT64_C(1) << (bin % 64));
    }
}

/* next_bin returns the first bin from `bin` on that is not empty, or NUM_BINS. */
static uint32_t next_bin(const pye_extents *e, uint32_t bin)
{
    for (uint32_t word = bin / 64; word < sizeof(e->filled) / 8; word++) {
        uint64_t bits = e->filled[word];
        if (word == bin / 64) {
            bits &= ~UINT64_C(0) << (bin % 64);
        }
        if (bits != 0) {
            return word * 64 + (uint32_t)__builtin_ctzll(bits);
        }
    }
    return NUM_BINS;
}

/* find_free returns a free run of at least `length` pages, or NONE. */
static uint32_t find_free(const pye_extents *e, uint64_t length)
{
    /* Its own bin first: what fits closely leaves long runs whole. */
    const uint32_t own = bin_of(length);
    uint32_t at = e->bin[own];
    for (uint32_t tries = 0; at != NONE && tries < 8; tries++, at = e->pages[at].next) {
        if (e->pages[at].length >= length) {
            return at;
        }
    }
    const uint32_t bin = next_bin(e, own + 1);
    if (bin < NUM_BINS) {
        return e->bin[bin];
    }
    while (at != NONE && e->pages[at].length < length) {
        at = e->pages[at].next;
    }
    return at;
}

/* take_run takes `length` pages from the free ones; NONE: there is no such run. */
static uint32_t take_run(pye_extents *e, uint64_t length, uint8_t state)
{
    const uint32_t first = find_free(e, length);
    if (first == NONE) {
        return NONE;
    }
    const uint32_t whole = e->pages[first].length;
    const uint32_t pages = (uint32_t)length;
    remove_free(e, first);
    if (whole > pages) {
        insert_free(e, first + pages, whole - pages);
    }
    set_run(e, first, pages, state);
    e->taken += pages;
    return first;
}

/* ---- slots of shared pages ---- */

static uint32_t class_of(uint64_t length)
{
    uint32_t class = 0;
    while (slot_size[class] < length) {
        class++;
    }
    return class;
}

static uint32_t slots_of(uint32_t class)
{
    return PYE_PAGE_SIZE / slot_size[class];
}

static pye_status take_slot(pye_extents *e, uint64_t *offset, uint64_t *given, uint64_t length)
{
    const uint32_t class = class_of(length);
    uint32_t at = e->room[class];
    if (at == NONE) {
        at = take_run(e, 1, SHARED);
        PYE_REFUSE_IF(at == NONE, PYE_E_LIMIT);
        e->pages[at].class = (uint8_t)class;
        e->pages[at].used = 0;
        e->pages[at].slots = 0;
        link_page(e, &e->room[class], at);
    }
    page *shared = &e->pages[at];
    const uint32_t slot = (uint32_t)__builtin_ctzll(~shared->slots);
    shared->slots |= UINT64_C(1) << slot;
    shared->used++;
    if (shared->used == slots_of(class)) {
        unlink_page(e, &e->room[class], at);
    }
    *offset = (uint64_t)at * PYE_PAGE_SIZE + slot * slot_size[class];
    *given = slot_size[class];
    return PYE_OK;
}

static void give_slot(pye_extents *e, pye_extent *freed, uint32_t at, uint32_t slot)
{
    page *shared = &e->pages[at];
    uint32_t *head = &e->room[shared->class];
    if (shared->used == slots_of(shared->class)) {
        link_page(e, head, at);
    }
    shared->slots &= ~(UINT64_C(1) << slot);
    shared->used--;
    /* The last page of a class with room stays: temporaries come and go one by one. */
    if (shared->used == 0 && (shared->prev != NONE || shared->next != NONE)) {
        unlink_page(e, head, at);
        set_run(e, at, 1, LEAVING);
        freed->offset = (uint64_t)at * PYE_PAGE_SIZE;
        freed->length = PYE_PAGE_SIZE;
    }
}

/* ---- for callers ---- */

pye_status pye_extents_init(pye_extents *e, uint64_t num_pages)
{
    PYE_REFUSE_IF(pye_extents_size(num_pages) == 0, PYE_E_ARGUMENT);
    e->num_pages = num_pages;
    e->taken = 0;
    memset(e->filled, 0, sizeof(e->filled));
    memset(e->bin, 0xff, sizeof(e->bin));
    memset(e->room, 0xff, sizeof(e->room));
    insert_free(e, 0, (uint32_t)num_pages);
    return PYE_OK;
}

pye_status pye_extents_take(pye_extents *e, uint64_t *offset, uint64_t *given, uint64_t length)
{
    *offset = 0;
    *given = 0;
    PYE_REFUSE_IF(length == 0, PYE_E_LENGTH);
    if (length <= PYE_EXTENT_SMALL) {
        return take_slot(e, offset, given, length);
    }
    PYE_REFUSE_IF(length > e->num_pages * PYE_PAGE_SIZE, PYE_E_LIMIT);
    const uint64_t pages = (length + PYE_PAGE_SIZE - 1) / PYE_PAGE_SIZE;
    const uint32_t first = take_run(e, pages, TAKEN);
    PYE_REFUSE_IF(first == NONE, PYE_E_LIMIT);
    *offset = (uint64_t)first * PYE_PAGE_SIZE;
    *given = pages * PYE_PAGE_SIZE;
    return PYE_OK;
}

/* locate finds the page and, on a shared page, the slot of the taken range that begins at
 * `offset`. */
static pye_status locate(const pye_extents *e, uint32_t *at, uint32_t *slot, uint64_t offset)
{
    PYE_REFUSE_IF(offset / PYE_PAGE_SIZE >= e->num_pages, PYE_E_ARGUMENT);
    *at = (uint32_t)(offset / PYE_PAGE_SIZE);
    *slot = 0;
    const page *found = &e->pages[*at];
    const uint32_t inside = (uint32_t)(offset % PYE_PAGE_SIZE);
    if (found->state == SHARED) {
        const uint32_t size = slot_size[found->class];
        *slot = inside / size;
        PYE_REFUSE_IF(inside % size != 0, PYE_E_ARGUMENT);
        /* Past the last slot the bit is never set. */
        PYE_REFUSE_IF((found->slots >> *slot & 1) == 0, PYE_E_ARGUMENT);
        return PYE_OK;
    }
    PYE_REFUSE_IF(found->state != TAKEN, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(inside != 0, PYE_E_ARGUMENT);
    return PYE_OK;
}

static uint64_t length_at(const pye_extents *e, uint32_t at)
{
    const page *found = &e->pages[at];
    return found->state == SHARED ? slot_size[found->class]
                                  : (uint64_t)found->length * PYE_PAGE_SIZE;
}

pye_status pye_extents_find(const pye_extents *e, uint64_t *length, uint64_t offset)
{
    uint32_t at;
    uint32_t slot;
    *length = 0;
    PYE_TRY(locate(e, &at, &slot, offset));
    *length = length_at(e, at);
    return PYE_OK;
}

pye_status pye_extents_give(pye_extents *e, pye_extent *freed, uint64_t offset)
{
    uint32_t at;
    uint32_t slot;
    *freed = (pye_extent){0, 0};
    PYE_TRY(locate(e, &at, &slot, offset));
    if (e->pages[at].state == SHARED) {
        give_slot(e, freed, at, slot);
        return PYE_OK;
    }
    e->pages[at].state = LEAVING;
    freed->offset = offset;
    freed->length = length_at(e, at);
    return PYE_OK;
}

pye_status pye_extents_settle(pye_extents *e, const pye_extent *freed)
{
    const uint64_t at = freed->offset / PYE_PAGE_SIZE;
    PYE_REFUSE_IF(freed->offset % PYE_PAGE_SIZE != 0, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(at >= e->num_pages, PYE_E_ARGUMENT);
    uint32_t first = (uint32_t)at;
    PYE_REFUSE_IF(e->pages[first].state != LEAVING, PYE_E_ARGUMENT);
    PYE_REFUSE_IF(length_at(e, first) != freed->length, PYE_E_ARGUMENT);
    uint32_t length = e->pages[first].length;
    e->taken -= length;
    forget(e, first);
    const uint64_t after = at + length;
    if (after < e->num_pages && e->pages[after].state == FREE) {
        const uint32_t more = e->pages[after].length;
        remove_free(e, (uint32_t)after);
        forget(e, (uint32_t)after);
        length += more;
    }
    if (first > 0) {
        /* The page before is the last of its run, and the first of it too if it is alone. */
        const page *before = &e->pages[first - 1];
        const uint32_t begin = before->state == LAST ? first - before->length : first - 1;
        if (e->pages[begin].state == FREE) {
            const uint32_t more = e->pages[begin].length;
            remove_free(e, begin);
            forget(e, begin);
            first = begin;
            length += more;
        }
    }
    insert_free(e, first, length);
    return PYE_OK;
}

/* grow lets the run at `first` have `pages` pages, with those behind it. */
static pye_status grow(pye_extents *e, uint32_t first, uint64_t pages)
{
    const uint32_t old = e->pages[first].length;
    const uint64_t after = (uint64_t)first + old;
    PYE_REFUSE_IF(after >= e->num_pages, PYE_E_LIMIT);
    PYE_REFUSE_IF(e->pages[after].state != FREE, PYE_E_LIMIT);
    const uint32_t more = e->pages[after].length;
    PYE_REFUSE_IF(pages - old > more, PYE_E_LIMIT);
    const uint32_t added = (uint32_t)pages - old;
    remove_free(e, (uint32_t)after);
    forget(e, (uint32_t)after);
    forget(e, first);
    if (more > added) {
        insert_free(e, (uint32_t)after + added, more - added);
    }
    set_run(e, first, (uint32_t)pages, TAKEN);
    e->taken += added;
    return PYE_OK;
}

pye_status pye_extents_resize(pye_extents *e, uint64_t *given, pye_extent *freed, uint64_t offset,
                              uint64_t length)
{
    uint32_t at;
    uint32_t slot;
    *given = 0;
    *freed = (pye_extent){0, 0};
    PYE_REFUSE_IF(length == 0, PYE_E_LENGTH);
    PYE_TRY(locate(e, &at, &slot, offset));
    const uint64_t now = length_at(e, at);
    if (e->pages[at].state == SHARED) {
        PYE_REFUSE_IF(length > now, PYE_E_LIMIT);
        *given = now;
        return PYE_OK;
    }
    PYE_REFUSE_IF(length > e->num_pages * PYE_PAGE_SIZE, PYE_E_LIMIT);
    const uint64_t pages = (length + PYE_PAGE_SIZE - 1) / PYE_PAGE_SIZE;
    const uint32_t old = e->pages[at].length;
    if (pages > old) {
        PYE_TRY(grow(e, at, pages));
    } else if (pages < old) {
        forget(e, at);
        set_run(e, at, (uint32_t)pages, TAKEN);
        set_run(e, at + (uint32_t)pages, old - (uint32_t)pages, LEAVING);
        freed->offset = offset + pages * PYE_PAGE_SIZE;
        freed->length = (old - pages) * PYE_PAGE_SIZE;
    }
    *given = pages * PYE_PAGE_SIZE;
    return PYE_OK;
}

uint64_t pye_extents_taken(const pye_extents *e)
{
    return e->taken * PYE_PAGE_SIZE;
}

uint64_t pye_extents_largest(const pye_extents *e)
{
    uint32_t longest = 0;
    for (uint32_t bin = NUM_BINS; bin-- > 0 && longest == 0;) {
        for (uint32_t at = e->bin[bin]; at != NONE; at = e->pages[at].next) {
            longest = e->pages[at].length > longest ? e->pages[at].length : longest;
        }
    }
    return (uint64_t)longest * PYE_PAGE_SIZE;
}
