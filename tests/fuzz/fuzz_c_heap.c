/* fuzz_c_heap.c - what a heap is made of, beside a model: -DFUZZ_EXTENTS (who has which range),
 * -DFUZZ_EPOCH (keys that outlive their counter). docs/fuzzing.md. */
#include "fuzz_c.h"

#if defined(FUZZ_EXTENTS)
#include "pyenclave/extents.h"

enum { PAGE = 4096, STEP = 64, MOST = 160, RANGES = 256 };
enum { FREE, TAKEN, SHARED, LEAVING };

/* The same, written down page by page and range by range. */
static struct {
    uint32_t pages;
    uint8_t kind[MOST];
    uint16_t size[MOST];                 /* SHARED: of its slots */
    uint16_t owner[MOST * PAGE / STEP];  /* range + 1 */
    pye_extent range[RANGES];            /* length 0: none */
    pye_extent leaving[MOST];
} m;

static uint32_t longest(void)
{
    uint32_t best = 0;

    for (uint32_t i = 0, run = 0; i < m.pages; i++) {
        run = m.kind[i] == FREE ? run + 1 : 0;
        best = run > best ? run : best;
    }
    return best;
}

static void set_kind(const pye_extent *of, uint8_t from, uint8_t to)
{
    FUZZ_CHECK(of->offset % PAGE == 0 && of->length % PAGE == 0, "no whole pages");
    for (uint64_t at = of->offset / PAGE; at < (of->offset + of->length) / PAGE; at++) {
        FUZZ_CHECK(at < m.pages && m.kind[at] == from, "pages of another kind");
        m.kind[at] = to;
    }
}

static void claim(uint32_t range, uint64_t offset, uint64_t length)
{
    m.range[range] = (pye_extent){offset, length};
    for (uint64_t at = offset / STEP; at < (offset + length) / STEP; at++) {
        FUZZ_CHECK(at < (uint64_t)m.pages * PAGE / STEP && m.owner[at] == 0, "two have one place");
        m.owner[at] = (uint16_t)(range + 1);
    }
}

static void unclaim(uint32_t range, uint64_t keep)
{
    const pye_extent was = m.range[range];

    for (uint64_t at = (was.offset + keep) / STEP; at < (was.offset + was.length) / STEP; at++) {
        m.owner[at] = 0;
    }
    m.range[range].length = keep;
}

/* Pages became free: nobody may have anything there. They wait for being settled. */
static void leave(const pye_extent *freed, uint8_t from)
{
    if (freed->length == 0) {
        return;
    }
    for (uint64_t at = freed->offset / STEP; at < (freed->offset + freed->length) / STEP; at++) {
        FUZZ_CHECK(m.owner[at] == 0, "what somebody has became free");
    }
    set_kind(freed, from, LEAVING);
    for (uint32_t i = 0; i < MOST; i++) {
        if (m.leaving[i].length == 0) {
            m.leaving[i] = *freed;
            return;
        }
    }
    FUZZ_CHECK(0, "more leave than there are");
}

static void take(pye_extents *e, uint32_t range, uint64_t length)
{
    const uint64_t pages = length / PAGE + (length % PAGE != 0);
    const uint32_t most = longest();
    uint64_t offset = 1;
    uint64_t given = 1;
    const pye_status rc = pye_extents_take(e, &offset, &given, length);

    if (rc != PYE_OK) {
        FUZZ_CHECK(offset == 0 && given == 0, "outputs of what was refused");
        FUZZ_CHECK(rc == (length == 0 ? PYE_E_LENGTH : PYE_E_LIMIT), "a status");
        FUZZ_CHECK(length == 0 || (length > PYE_EXTENT_SMALL ? pages > most : most == 0),
                   "refused though there is room");
        return;
    }
    FUZZ_CHECK(length > 0 && given >= length && offset % STEP == 0, "a range that does not do");
    if (length > PYE_EXTENT_SMALL) {
        FUZZ_CHECK(given == pages * PAGE, "other than whole pages");
        set_kind(&(pye_extent){offset, given}, FREE, TAKEN);
    } else {
        const uint64_t page = offset / PAGE;
        FUZZ_CHECK(page < m.pages && offset % PAGE % given == 0 && offset % PAGE + given <= PAGE,
                   "no slot of a page");
        FUZZ_CHECK(m.kind[page] == FREE || (m.kind[page] == SHARED && m.size[page] == given),
                   "a slot of a page that is not for it");
        m.kind[page] = SHARED;
        m.size[page] = (uint16_t)given;
    }
    claim(range, offset, given);
}

static void resize(pye_extents *e, uint32_t range, uint64_t length)
{
    const pye_extent was = m.range[range];
    const uint64_t pages = length / PAGE + (length % PAGE != 0);
    const int whole = was.length > PYE_EXTENT_SMALL;
    pye_extent freed = {1, 1};
    uint64_t given = 1;
    uint64_t behind = (was.offset + was.length) / PAGE;
    uint64_t room = was.length / PAGE;
    const pye_status rc = pye_extents_resize(e, &given, &freed, was.offset, length);

    for (; whole && behind < m.pages && m.kind[behind] == FREE; behind++) {
        room++;
    }
    const int fits = whole ? pages <= room : length <= was.length;
    FUZZ_CHECK(rc == (length == 0 ? PYE_E_LENGTH : fits ? PYE_OK : PYE_E_LIMIT), "a status");
    if (rc != PYE_OK) {
        FUZZ_CHECK(given == 0 && freed.length == 0, "outputs of what was refused");
        return;
    }
    FUZZ_CHECK(given == (whole ? pages * PAGE : was.length), "another length");
    unclaim(range, given < was.length ? given : was.length);
    FUZZ_CHECK(freed.length == (given < was.length ? was.length - given : 0), "freed");
    leave(&freed, TAKEN);
    if (given > was.length) {
        set_kind(&(pye_extent){was.offset + was.length, given - was.length}, FREE, TAKEN);
        m.range[range].length = 0;
        for (uint64_t at = was.offset / STEP; at < (was.offset + was.length) / STEP; at++) {
            m.owner[at] = 0;
        }
        claim(range, was.offset, given);
    }
}

static void give(pye_extents *e, uint32_t range)
{
    const pye_extent was = m.range[range];
    pye_extent freed = {1, 1};

    FUZZ_CHECK(pye_extents_give(e, &freed, was.offset) == PYE_OK, "it is not taken back");
    unclaim(range, 0);
    if (was.length > PYE_EXTENT_SMALL) {
        FUZZ_CHECK(freed.offset == was.offset && freed.length == was.length, "freed");
        leave(&freed, TAKEN);
    } else {
        FUZZ_CHECK(freed.length == 0 || freed.length == PAGE, "freed");
        leave(&freed, SHARED);
    }
}

static void settle(pye_extents *e, pye_extent what)
{
    uint32_t i = 0;

    while (i < MOST && (m.leaving[i].length == 0 || m.leaving[i].offset != what.offset ||
                        m.leaving[i].length != what.length)) {
        i++;
    }
    const pye_status rc = pye_extents_settle(e, &what);
    FUZZ_CHECK(rc == (i < MOST ? PYE_OK : PYE_E_ARGUMENT), "what may be settled");
    if (i < MOST) {
        set_kind(&what, LEAVING, FREE);
        m.leaving[i].length = 0;
    }
}

/* Any offset: it is the beginning of a range, or refused. */
static void anywhere(pye_extents *e, uint64_t offset, int change)
{
    const uint64_t end = (uint64_t)m.pages * PAGE;
    const uint32_t owner = offset < end && offset % STEP == 0 ? m.owner[offset / STEP] : 0;
    const int begins = owner != 0 && m.range[owner - 1].offset == offset;
    pye_extent freed = {1, 1};
    uint64_t length = 1;

    FUZZ_CHECK(pye_extents_find(e, &length, offset) == (begins ? PYE_OK : PYE_E_ARGUMENT), "find");
    FUZZ_CHECK(length == (begins ? m.range[owner - 1].length : 0), "the length that was found");
    if (begins && change) {
        give(e, owner - 1);
    } else if (change) {
        FUZZ_CHECK(pye_extents_give(e, &freed, offset) == PYE_E_ARGUMENT && freed.length == 0,
                   "given back by who does not have it");
        FUZZ_CHECK(pye_extents_resize(e, &length, &freed, offset, 1) == PYE_E_ARGUMENT, "resized");
    }
}

/* A length: bytes, pages, or any number. */
static uint64_t take_length(fuzz_input *input)
{
    const uint64_t how = fuzz_take(input, 1);

    return how < 80 ? how * 32 : how < 240 ? (how - 80) * PAGE / 2 : fuzz_number(input);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input = {data, size};

    memset(&m, 0, sizeof(m));
    m.pages = 1 + (uint32_t)fuzz_take(&input, 1) % MOST;
    /* Exactly what is asked for, so that a byte more is seen. */
    pye_extents *const e = calloc(1, (size_t)pye_extents_size(m.pages));
    FUZZ_CHECK(e != NULL && pye_extents_init(e, m.pages) == PYE_OK, "init");
    for (int i = 0; i < 600 && input.left > 0; i++) {
        const uint64_t op = fuzz_take(&input, 1) % 12;
        const uint32_t range = (uint32_t)fuzz_take(&input, 1) % RANGES;
        const pye_extent freed = m.leaving[range % MOST];
        uint32_t taken = 0;

        if (op < 8) { /* a range: taken, resized, given back */
            if (m.range[range].length == 0) {
                take(e, range, take_length(&input));
            } else if (op < 4) {
                give(e, range);
            } else {
                resize(e, range, take_length(&input));
            }
        } else if (op < 10) {
            if (freed.length != 0) {
                settle(e, freed);
            }
        } else if (op == 10) {
            anywhere(e, fuzz_take(&input, 2) * STEP + (range == 255), (int)range & 1);
        } else {
            const uint64_t pages = range % 8;
            settle(e, (pye_extent){fuzz_take(&input, 2) % (MOST + 9) * PAGE + (range == 255),
                                   pages * PAGE});
        }
        for (uint32_t k = 0; k < m.pages; k++) {
            taken += m.kind[k] != FREE;
        }
        FUZZ_CHECK(pye_extents_taken(e) == (uint64_t)taken * PAGE, "how much is taken");
        FUZZ_CHECK(pye_extents_largest(e) == (uint64_t)longest() * PAGE, "the longest that is free");
    }
    free(e);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* pages - 1; then op, range, length (below 80: 32 bytes each; then half pages) */
    static const uint8_t seeds[][40] = {
        {40, 0, 1, 84, 0, 2, 90, 0, 3, 86, 0, 2, 8, 0, 5, 1, 96, 0, 1, 8, 0, 8, 1, 0, 9, 82},
        {9, 0, 1, 2, 0, 2, 2, 0, 3, 64, 0, 4, 64, 0, 5, 64, 0, 3, 0, 4, 0, 5, 8, 0, 8, 1, 0, 1},
        {159, 0, 1, 120, 0, 2, 120, 4, 1, 84, 8, 0, 4, 1, 110, 10, 1, 0, 8, 11, 2, 9, 0, 0, 2},
        {20, 0, 1, 88, 0, 2, 88, 0, 3, 88, 0, 1, 0, 3, 8, 0, 8, 1, 0, 2, 8, 0, 0, 9, 110, 4, 9, 82},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}

#elif defined(FUZZ_EPOCH)
#include "pyenclave/epoch.h"
#include "pyenclave/gcm.h"

enum { KEPT = 6 };

typedef struct {
    uint8_t sealed[PYE_PAGE_SIZE];
    uint8_t tag[PYE_PAGE_TAG_SIZE];
    uint64_t version; /* 0: nothing */
    uint8_t filled;
} record;

static record kept[KEPT];
static uint64_t next; /* the version that the next page has, or one of the next epoch's */
static int ended;

static void fill(uint8_t *page, uint8_t with)
{
    memset(page, with, PYE_PAGE_SIZE);
}

static void seal(pye_epoch_key *key, size_t which, uint64_t num)
{
    static uint8_t plain[PYE_PAGE_SIZE];
    const uint64_t left = PYE_PAGE_MAX_PAGES + 1 - (next & 0xffffffffff);
    const pye_page_info info = {which * PYE_PAGE_SIZE, 3, 2};
    pye_page_key *page_key = NULL;
    record *const r = &kept[which];
    const pye_status rc = pye_epoch_to_seal(key, &page_key, num);

    if (ended) {
        FUZZ_CHECK(rc == PYE_E_CLOSED && page_key == NULL, "a key that has ended seals");
        return;
    }
    if (num == 0 || num > PYE_PAGE_MAX_PAGES) {
        FUZZ_CHECK(rc == PYE_E_LENGTH, "so many pages");
        return;
    }
    if (num > left) {
        if (next >> 40 == PYE_EPOCH_LAST) {
            FUZZ_CHECK(rc == PYE_E_LIMIT && page_key == NULL, "beyond the last epoch");
            ended = 1;
            return;
        }
        next = ((next >> 40) + 1) << 40 | 1;
    }
    FUZZ_CHECK(rc == PYE_OK && page_key != NULL, "it does not seal");
    fill(plain, ++r->filled);
    FUZZ_CHECK(pye_page_seal(page_key, r->sealed, r->tag, &r->version, plain, &info) == PYE_OK,
               "seal");
    FUZZ_CHECK(r->version == next && pye_epoch_number(key) == next >> 40, "another version");
    next++;
}

/* Opens pages from one on, as they were or with one thing changed. */
static void open_some(pye_epoch_key *key, fuzz_input *input)
{
    static uint8_t in[KEPT * PYE_PAGE_SIZE], out[KEPT * PYE_PAGE_SIZE];
    uint8_t tags[KEPT * PYE_PAGE_TAG_SIZE];
    uint64_t versions[KEPT];
    pye_page_job jobs[KEPT];
    const size_t first = (size_t)fuzz_take(input, 1) % KEPT;
    const size_t num = (size_t)fuzz_take(input, 1) % (KEPT - first + 1);
    const size_t at = first + (num > 0 ? (size_t)fuzz_take(input, 1) % num : 0);
    const uint64_t what = fuzz_take(input, 1) % 10;
    const uint64_t value = fuzz_number(input);
    pye_page_info info = {first * PYE_PAGE_SIZE, 3, 2};
    int good = 1, known = 1;
    pye_status rc;

    memset(out, 0xcc, sizeof(out));
    for (size_t i = first; i < KEPT; i++) {
        memcpy(in + i * PYE_PAGE_SIZE, kept[i].sealed, PYE_PAGE_SIZE);
        memcpy(tags + i * PYE_PAGE_TAG_SIZE, kept[i].tag, PYE_PAGE_TAG_SIZE);
        versions[i] = kept[i].version;
    }
    if (what == 1) {
        in[at * PYE_PAGE_SIZE + value % PYE_PAGE_SIZE] ^= 1;
    } else if (what == 2) {
        tags[at * PYE_PAGE_TAG_SIZE + value % PYE_PAGE_TAG_SIZE] ^= 0x10;
    } else if (what == 3) {
        versions[at] ^= value;
    } else if (what == 4) {
        versions[at] ^= (value & 3) << 40;
    } else if (what == 5) {
        info.address ^= value;
    }
    good = what != 1 && what != 2 && info.address == first * PYE_PAGE_SIZE;
    for (size_t i = first; i < first + num; i++) {
        good = good && versions[i] == kept[i].version && versions[i] != 0;
        known = known && versions[i] >> 40 <= next >> 40;
    }
    if (what & 1) {
        for (size_t i = first; i < first + num; i++) {
            jobs[i] = (pye_page_job){.in = in + i * PYE_PAGE_SIZE, .out = out + i * PYE_PAGE_SIZE,
                                     .tag = tags + i * PYE_PAGE_TAG_SIZE, .version = versions[i],
                                     .info = info};
            jobs[i].info.address += (i - first) * PYE_PAGE_SIZE;
        }
        rc = pye_epoch_jobs_open(key, jobs + first, num);
    } else {
        rc = pye_epoch_pages_open(key, out + first * PYE_PAGE_SIZE, in + first * PYE_PAGE_SIZE,
                                  tags + first * PYE_PAGE_TAG_SIZE, versions + first, num, &info);
    }
    const pye_status wanted = num == 0 ? PYE_E_LENGTH
                              : ended  ? PYE_E_CLOSED
                              : good   ? PYE_OK
                                       : PYE_E_AUTH;
    FUZZ_CHECK(rc == wanted || (!known && rc == PYE_E_ARGUMENT), "opened, or refused");
    for (size_t i = first; i < first + num && (rc == PYE_OK || rc == PYE_E_AUTH); i++) {
        for (size_t k = 0; k < PYE_PAGE_SIZE; k++) {
            FUZZ_CHECK(out[i * PYE_PAGE_SIZE + k] == (rc == PYE_OK ? kept[i].filled : 0),
                       "other bytes");
        }
    }
}

static void skip(pye_epoch_key *key, uint64_t to)
{
    const uint64_t counter = to & 0xffffffffff;
    const int may = to >> 40 >= next >> 40 && counter > 0 && counter <= PYE_PAGE_MAX_PAGES + 1 &&
                    (to >> 40 > next >> 40 || to >= next);
    const pye_status rc = pye_epoch_skip(key, to);

    FUZZ_CHECK(rc == (ended ? PYE_E_CLOSED : may ? PYE_OK : PYE_E_ARGUMENT), "a skip");
    next = rc == PYE_OK ? to : next;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t memory[1 << 16] __attribute__((aligned(64)));
    static const uint8_t secret[PYE_EPOCH_SECRET_SIZE] = {7}, name[PYE_PAGE_ENCLAVE_SIZE] = {9};
    pye_epoch_key *const key = (pye_epoch_key *)(void *)memory;
    fuzz_input input = {data, size};

    memset(kept, 0, sizeof(kept));
    next = 1;
    ended = 0;
    FUZZ_CHECK(pye_epoch_key_size() <= sizeof(memory), "the key's size");
    FUZZ_CHECK(pye_epoch_key_init(key, secret, name, UINT32_MAX) == PYE_OK, "init");
    for (int i = 0; i < 40 && input.left > 0; i++) {
        const uint64_t op = fuzz_take(&input, 1) % 8;
        if (op < 3) {
            const uint64_t which = fuzz_take(&input, 1);
            seal(key, which % KEPT, which < 200 ? 1 : fuzz_number(&input));
        } else if (op == 3) { /* near the end of an epoch, this one or one that is near */
            const uint64_t how = fuzz_take(&input, 1);
            skip(key, ((next >> 40) + how % 3) << 40 | (PYE_PAGE_MAX_PAGES + 2 - how / 3 % 5));
        } else if (op == 4) {
            skip(key, fuzz_number(&input) << 40 | fuzz_number(&input));
        } else {
            open_some(key, &input);
        }
    }
    pye_epoch_key_destroy(key);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* 0 which: seal; 3 how: skip; 4 edges: skip; 5 first num at what number: open */
    static const uint8_t seeds[][32] = {
        {0, 0, 0, 1, 3, 6, 0, 2, 0, 3, 5, 0, 4, 0, 0, 0, 5, 0, 4, 2, 7, 0, 5, 0, 4, 1, 4, 1},
        {0, 0, 3, 1, 0, 1, 3, 4, 0, 2, 5, 0, 3, 0, 1, 9, 5, 0, 3, 2, 2, 3, 5, 1, 1, 0, 6, 0},
        {4, 206, 25, 1, 0, 0, 3, 5, 0, 1, 0, 2, 0, 200, 9, 5, 0, 3, 1, 0, 0},
        {0, 0, 4, 8, 1, 0, 1, 5, 0, 2, 0, 3, 1, 5, 0, 2, 1, 4, 2, 5, 0, 2, 1, 5, 4},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
#endif
