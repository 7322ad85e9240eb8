/* fuzz_c_readers.c - readers of private bytes that somebody else wrote: -DFUZZ_BATCH, -DFUZZ_MSGPACK,
 * -DFUZZ_PAGE, -DFUZZ_MEASURE. docs/fuzzing.md. */
#include "fuzz_c.h"

#if defined(FUZZ_BATCH)
#include "pyenclave/batch.h"

static pye_status answer(const uint8_t *in, size_t in_len, uint8_t *out, size_t *out_len)
{
    const size_t room = *out_len;

    if (in_len > 0 && in[0] == 0xee) {
        return PYE_E_STATE;
    }
    *out_len = in_len > 0 && in[0] == 0xdd ? room + 1 : in_len < room ? in_len : room;
    memset(out, in_len > 0 ? in[0] : 1, in_len < room ? in_len : room);
    return PYE_OK;
}

static void forget(uint8_t *memory, size_t len)
{
    memset(memory, 0, len);
}

/* Every item of a batch that was accepted lies within it, one behind the other. */
static void walk(pye_batch batch, const uint8_t *data, size_t size, uint32_t align)
{
    const uint8_t *item;
    const uint8_t *end = data;
    size_t item_len;
    uint32_t tag;
    uint32_t num = 0;
    uint8_t found = 0;

    while (pye_batch_next(&batch, &item, &item_len, &tag)) {
        FUZZ_CHECK(item >= end && (size_t)(item - data) <= size, "an item before the last");
        FUZZ_CHECK(item_len <= size - (size_t)(item - data), "an item beyond the batch");
        FUZZ_CHECK((size_t)(item - data) % align == 0, "an item that is not aligned");
        for (size_t i = 0; i < item_len; i++) {
            found |= item[i];
        }
        end = item + item_len;
        num++;
    }
    FUZZ_CHECK(num == batch.count && num <= PYE_BATCH_MAX_ITEMS, "another number of items");
    (void)found;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t arena[16384] __attribute__((aligned(64)));
    fuzz_input input = {data, size};
    const uint64_t how = fuzz_take(&input, 1);
    const uint32_t align = 1u << (how & 7);
    const int reply = how >> 3 & 1;
    const size_t len = input.left;
    uint8_t *copy = malloc(len ? len : 1);
    pye_batch batch;

    FUZZ_CHECK(copy != NULL, "no memory");
    memcpy(copy, input.at, len);
    if (pye_batch_open(&batch, copy, len, align, reply) == PYE_OK) {
        const uint64_t each = batch.form == PYE_BATCH_EVEN ? batch.size : how >> 4;
        const size_t all = each <= 256 ? (size_t)each * batch.count : 0;
        uint8_t *out = malloc(all ? all : 1);
        FUZZ_CHECK(out != NULL, "no memory");
        walk(batch, copy, len, align);
        pye_batch again = batch;
        const pye_status rc = pye_batch_gather(&again, out, all, each);
        FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_LENGTH, "gather");
        free(out);
    } else {
        FUZZ_CHECK(batch.count == 0, "a batch that was refused has items");
    }
    pye_status (*const call)(const uint8_t *, size_t, uint8_t *, size_t *) = answer;
    const size_t cap = 1024 + (size_t)(how >> 4) * 960;
    const uint8_t *got;
    size_t got_len;
    size_t used;
    void *function;
    memcpy(&function, &call, sizeof(function));
    if (pye_batch_native(function, &got, &got_len, &used, arena, cap, copy, len, forget) ==
        PYE_OK) {
        FUZZ_CHECK(got >= arena && got_len <= cap && used <= cap, "an answer beyond the arena");
        FUZZ_CHECK(pye_batch_open(&batch, got, got_len, PYE_BATCH_MAX_ALIGN, 1) == PYE_OK,
                   "an answer that is no batch");
        walk(batch, got, got_len, PYE_BATCH_MAX_ALIGN);
    }
    free(copy);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    const uint32_t counts[] = {1, 3, 2, 4, 1};
    const int table = which % 2;

    if (which >= 5 || cap < 1024) {
        return 0;
    }
    const uint32_t count = counts[which];
    const size_t start = pye_batch_start((uint32_t)table, count);
    out[0] = (uint8_t)(6 | (which == 3) << 3 | 0xf0);
    memset(out + 1, 0, 1023);
    pye_batch_head(out + 1, (uint32_t)table, count, table ? 0 : 64, 0);
    for (uint32_t i = 0; i < count && table; i++) {
        pye_batch_set(out + 1, i, which == 3 && i == 1 ? PYE_BATCH_ERROR : 0, 7 + i);
        memset(out + 1 + start + 64 * i, (int)(0xdc + i), 7 + i);
    }
    return 1 + start + 64 * count;
}

#elif defined(FUZZ_MSGPACK)
#include "pyenclave/call.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input = {data, size};
    const uint32_t depth = (uint32_t)fuzz_take(&input, 1) % 68;
    const size_t len = input.left;
    const pye_status rc = pye_msgpack_check(input.at, len, depth);

    FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_ARGUMENT || rc == PYE_E_LIMIT, "a status");
    if (rc == PYE_OK) {
        FUZZ_CHECK(depth > 0 && depth <= 64, "a depth that may not be asked for");
        FUZZ_CHECK(pye_msgpack_check(input.at, len - 1, depth) != PYE_OK, "a value cut short");
        FUZZ_CHECK(depth == 64 || pye_msgpack_check(input.at, len, depth + 1) == PYE_OK,
                   "refused with more depth");
    }
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    static const uint8_t seeds[][24] = {
        {19, 32, 0x93, 0x01, 0xa3, 'a', 'b', 'c', 0x82, 0xa1, 'k', 0xc3, 0x02, 0xcb, 0, 1, 2, 3, 4, 5},
        {11, 32, 0xdc, 0, 2, 0xc4, 1, 9, 0xd9, 1, 'x', 0xc0},
        {12, 32, 0xc7, 12, 0xff, 0, 0, 0, 1, 0, 0, 0, 0},
        {9, 4, 0x91, 0x91, 0x91, 0x91, 0xcd, 1, 2, 3},
        {14, 8, 0xdf, 0, 0, 0, 1, 0xd3, 1, 2, 3, 4, 5, 6, 7, 8},
        {8, 8, 0xd6, 0xff, 1, 2, 3, 4, 0xd7},
        {6, 8, 0xde, 0, 1, 0xcc, 5},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which] + 1, seeds[which][0]);
    return seeds[which][0];
}

#elif defined(FUZZ_PAGE)
#include "pyenclave/gcm.h"
#include "pyenclave/page.h"

/* One page, sealed; then the input changes what lies in untrusted memory, or what is asked for. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t memory[1 << 16] __attribute__((aligned(64)));
    static const uint8_t secret[32] = {7}, enclave[PYE_PAGE_ENCLAVE_SIZE] = {9};
    static uint8_t plain[PYE_PAGE_SIZE], sealed[PYE_PAGE_SIZE], out[PYE_PAGE_SIZE];
    pye_page_key *key = (pye_page_key *)(void *)memory;
    fuzz_input input = {data, size};
    uint8_t tag[PYE_PAGE_TAG_SIZE];
    pye_page_info info = {0x1000, 3, 2};
    uint64_t version;
    int changed = 0;

    FUZZ_CHECK(pye_page_key_size() <= sizeof(memory), "the key's size");
    FUZZ_CHECK(pye_page_key_init(key, secret, 32, enclave, UINT32_MAX) == PYE_OK, "init");
    memset(plain, 0x6b, sizeof(plain));
    FUZZ_CHECK(pye_page_seal(key, sealed, tag, &version, plain, &info) == PYE_OK, "seal");
    const uint64_t first = version;
    while (input.left > 0) {
        const uint64_t what = fuzz_take(&input, 1) % 6;
        const uint64_t value = fuzz_number(&input);
        if (what == 0) {
            sealed[fuzz_take(&input, 2) % PYE_PAGE_SIZE] ^= (uint8_t)value;
        } else if (what == 1) {
            tag[fuzz_take(&input, 1) % PYE_PAGE_TAG_SIZE] ^= (uint8_t)value;
        } else if (what == 2) {
            version ^= value;
        } else if (what == 3) {
            info.address ^= value;
        } else if (what == 4) {
            info.flags ^= (uint32_t)value;
        } else {
            info.type ^= (uint8_t)value;
        }
    }
    /* What is changed twice may be what it was: seal it again under another key and compare. */
    uint8_t whole_tag[PYE_PAGE_TAG_SIZE];
    const pye_page_info was = {0x1000, 3, 2};
    uint64_t again;
    pye_page_key_destroy(key);
    FUZZ_CHECK(pye_page_key_init(key, secret, 32, enclave, UINT32_MAX) == PYE_OK, "init");
    FUZZ_CHECK(pye_page_seal(key, out, whole_tag, &again, plain, &was) == PYE_OK, "seal");
    changed = memcmp(out, sealed, sizeof(out)) != 0 || memcmp(tag, whole_tag, sizeof(tag)) != 0 ||
              version != first || info.address != was.address || info.flags != was.flags ||
              info.type != was.type;
    memset(out, 0xcc, sizeof(out));
    const pye_status rc = pye_page_open(key, out, sealed, tag, version, &info);
    if (changed) {
        FUZZ_CHECK(rc != PYE_OK, "a page that was changed is opened");
        for (size_t i = 0; rc == PYE_E_AUTH && i < sizeof(out); i++) {
            FUZZ_CHECK(out[i] == 0, "a refused page is not zero");
        }
    } else {
        FUZZ_CHECK(rc == PYE_OK && memcmp(out, plain, sizeof(out)) == 0, "a good page is refused");
    }
    pye_page_key_destroy(key);
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    static const uint8_t seeds[][8] = {
        {0, 1, 5, 0}, {1, 1, 15}, {2, 1}, {3, 19}, {4, 2}, {5, 1}, {0, 1, 9, 0, 0, 1, 9, 0}};

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < 8) {
        return 0;
    }
    memcpy(out, seeds[which], 8);
    return 8;
}

#elif defined(FUZZ_MEASURE)
#include "pyenclave/measure.h"

/* What the header lets a caller do, written a second time. */
typedef struct {
    uint64_t size; /* 0: not created */
    uint64_t next; /* the chunk that may come, if `open` */
    int open;
} model;

static int may_add(const model *m, uint64_t offset, uint64_t num_pages, uint64_t flags)
{
    const int ordinary = (flags & ~UINT64_C(7)) == PYE_SGX_REG &&
                         ((flags & PYE_SGX_W) == 0 || (flags & PYE_SGX_R) != 0);

    return m->size != 0 && (!m->open || m->next % PYE_SGX_PAGE_SIZE == 0) &&
           offset % PYE_SGX_PAGE_SIZE == 0 && offset <= m->size &&
           num_pages <= (m->size - offset) / PYE_SGX_PAGE_SIZE &&
           (ordinary || flags == PYE_SGX_TCS);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input = {data, size};
    pye_sgx_measure ctx;
    model m = {0, 0, 0};
    uint8_t digest[PYE_SHA256_SIZE];

    memset(&ctx, 0, sizeof(ctx));
    for (int i = 0; i < 200 && input.left > 0; i++) {
        const pye_sgx_measure before = ctx;
        const uint64_t op = fuzz_take(&input, 1) % 6;
        const uint64_t a = fuzz_number(&input);
        const uint64_t flags = fuzz_take(&input, 2);
        const size_t num = fuzz_take(&input, 1) % 5;
        /* Exactly what is asked for, so that a byte more is seen. */
        const size_t len = op == 2 ? PYE_SGX_CHUNK_SIZE : op == 3 ? num * PYE_SGX_PAGE_SIZE : 0;
        uint8_t *content = malloc(len ? len : 1);
        pye_status rc = PYE_OK;
        int may = 0;

        FUZZ_CHECK(content != NULL, "no memory");
        memset(content, 1, len);
        if (op == 0) {
            may = a >= PYE_SGX_MIN_SIZE && (a & (a - 1)) == 0 && flags != 0;
            rc = pye_sgx_create(&ctx, a, (uint32_t)flags);
            m = (model){may ? a : 0, 0, 0};
        } else if (op == 1) {
            may = may_add(&m, a, 1, flags);
            rc = pye_sgx_add(&ctx, a, flags);
            m = may ? (model){m.size, a, 1} : m;
        } else if (op == 2) {
            const uint64_t at = num == 0 ? a : before.next_chunk;
            may = m.size != 0 && m.open && at == m.next;
            rc = pye_sgx_extend(&ctx, at, content);
            m.next += may ? PYE_SGX_CHUNK_SIZE : 0;
            m.open = m.open && (!may || m.next % PYE_SGX_PAGE_SIZE != 0);
        } else if (op == 3 || op == 4) {
            may = may_add(&m, a, num, flags);
            rc = op == 3 ? pye_sgx_add_pages(&ctx, content, num, a, flags, (int)(flags >> 8) & 1)
                         : pye_sgx_add_filled(&ctx, (uint32_t)flags, num, a, flags);
            m.open = m.open && (!may || num == 0);
        } else {
            may = m.size != 0 && (!m.open || m.next % PYE_SGX_PAGE_SIZE == 0);
            rc = pye_sgx_digest(&ctx, digest);
            for (size_t k = 0; rc != PYE_OK && k < sizeof(digest); k++) {
                FUZZ_CHECK(digest[k] == 0, "a digest that was refused is not zero");
            }
        }
        free(content);
        FUZZ_CHECK(rc == PYE_OK || rc == PYE_E_ARGUMENT || rc == PYE_E_LENGTH ||
                       rc == PYE_E_ALIGNMENT || rc == PYE_E_STATE || rc == PYE_E_LIMIT,
                   "a status");
        FUZZ_CHECK(may == (rc == PYE_OK), "accepted or refused against the header");
        if (op == 0 && rc != PYE_OK) {
            FUZZ_CHECK(pye_sgx_digest(&ctx, digest) == PYE_E_STATE, "created though refused");
        } else {
            FUZZ_CHECK(rc == PYE_OK || memcmp(&ctx, &before, sizeof(ctx)) == 0,
                       "a refused call changed the measurement");
        }
    }
    return 0;
}

size_t fuzz_seed(unsigned which, uint8_t *out, size_t cap)
{
    /* op, number (an edge by its place: 19 is 4096, 21 is 8192, 23 is 65536), flags, count */
    static const uint8_t seeds[][30] = {
        {0, 23, 1, 0, 0, 1, 0, 3, 2, 0, 2, 0, 0, 0, 1, 5, 0, 0, 0, 0},
        {0, 23, 1, 0, 0, 3, 0, 3, 3, 2, 4, 21, 1, 2, 2, 5, 0, 0, 0, 0},
        {0, 21, 1, 0, 0, 1, 19, 0, 1, 0, 5, 0, 0, 0, 0, 3, 0, 3, 2, 1},
        {1, 0, 3, 2, 0, 5, 0, 0, 0, 0, 0, 22, 1, 0, 0},
    };

    if (which >= sizeof(seeds) / sizeof(seeds[0]) || cap < sizeof(seeds[0])) {
        return 0;
    }
    memcpy(out, seeds[which], sizeof(seeds[0]));
    return sizeof(seeds[0]);
}
#endif
