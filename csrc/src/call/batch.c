/* batch.c - packed calls: checks of what came, and the loop over native functions.
 * docs/formats/ring.md, "Batches". Threats: BND-01 to BND-08. */
#include "pyenclave/batch.h"
#include "base/check.h"
#include "pyenclave/call.h"

#include <string.h>

_Static_assert(PYE_BATCH_HEADER_SIZE % PYE_BATCH_MAX_ALIGN == 0, "items begin aligned");

#define TAG_SHIFT 62
#define LENGTH_MASK (((uint64_t)1 << TAG_SHIFT) - 1)
#define USED_HEADER 20 /* the rest is zero */

typedef pye_status (*native_function)(const uint8_t *in, size_t in_len, uint8_t *out,
                                      size_t *out_len);

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t load64(const uint8_t *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

/* `value` is at most PYE_BATCH_MAX_ITEMS * 8 or below SIZE_MAX - 64 in every use. */
static size_t round_up(size_t value, size_t align)
{
    return (value + align - 1) / align * align;
}

static int all_zero(const uint8_t *data, size_t len)
{
    uint8_t found = 0;

    for (size_t i = 0; i < len; i++) {
        found |= data[i];
    }
    return found == 0;
}

size_t pye_batch_start(uint32_t form, uint32_t count)
{
    const size_t table = form == PYE_BATCH_TABLE ? (size_t)count * 8 : 0;

    return PYE_BATCH_HEADER_SIZE + round_up(table, PYE_BATCH_MAX_ALIGN);
}

static uint64_t table_word(const pye_batch *batch, uint32_t place)
{
    return load64(batch->data + PYE_BATCH_HEADER_SIZE + (size_t)place * 8);
}

/* The tags and lengths of a table, and the padding after each item. */
static pye_status check_table(const pye_batch *batch, size_t len, int reply)
{
    pye_status rc;
    size_t at = batch->at;
    uint32_t last = PYE_BATCH_ITEM;

    for (uint32_t i = 0; i < batch->count; i++) {
        const uint64_t word = table_word(batch, i);
        const uint64_t size = word & LENGTH_MASK;
        const uint32_t tag = (uint32_t)(word >> TAG_SHIFT);

        PYE_REQUIRE(reply || tag == PYE_BATCH_ITEM, PYE_E_ARGUMENT);
        PYE_REQUIRE(tag != PYE_BATCH_STATUS || size == 4, PYE_E_ARGUMENT);
        /* What was not called is at the end, and one at least was called. */
        PYE_REQUIRE(tag != PYE_BATCH_NOT_RUN || (size == 0 && i > 0), PYE_E_ARGUMENT);
        PYE_REQUIRE(last != PYE_BATCH_NOT_RUN || tag == PYE_BATCH_NOT_RUN, PYE_E_ARGUMENT);
        /* No sum is formed before its terms are known to be small enough (BND-02). */
        PYE_REQUIRE(size <= len - at, PYE_E_ARGUMENT);
        const size_t end = at + (size_t)size;
        const size_t pad = (batch->align - end % batch->align) % batch->align;
        PYE_REQUIRE(pad <= len - end, PYE_E_ARGUMENT);
        PYE_REQUIRE(all_zero(batch->data + end, pad), PYE_E_ARGUMENT);
        at = end + pad;
        last = tag;
    }
    PYE_REQUIRE(at == len, PYE_E_ARGUMENT);
    rc = PYE_OK;
done:
    return rc;
}

pye_status pye_batch_open(pye_batch *out, const uint8_t *data, size_t len, uint32_t align,
                          int reply)
{
    pye_status rc;
    pye_batch batch = {.data = data, .align = align};

    memset(out, 0, sizeof(*out));
    PYE_REQUIRE(align != 0 && align <= PYE_BATCH_MAX_ALIGN && (align & (align - 1)) == 0,
                PYE_E_ARGUMENT);
    PYE_REQUIRE(len >= PYE_BATCH_HEADER_SIZE, PYE_E_ARGUMENT);
    batch.count = load32(data);
    batch.form = load32(data + 4);
    batch.size = load64(data + 8);
    batch.budget_ms = load32(data + 16);
    PYE_REQUIRE(all_zero(data + USED_HEADER, PYE_BATCH_HEADER_SIZE - USED_HEADER), PYE_E_ARGUMENT);
    PYE_REQUIRE(batch.count > 0 && batch.count <= PYE_BATCH_MAX_ITEMS, PYE_E_ARGUMENT);
    PYE_REQUIRE(!reply || batch.budget_ms == 0, PYE_E_ARGUMENT);
    PYE_REQUIRE(batch.form == PYE_BATCH_EVEN || batch.form == PYE_BATCH_TABLE, PYE_E_ARGUMENT);
    batch.at = pye_batch_start(batch.form, batch.count);
    PYE_REQUIRE(batch.at <= len, PYE_E_ARGUMENT);
    if (batch.form == PYE_BATCH_EVEN) {
        PYE_REQUIRE(batch.size % align == 0, PYE_E_ARGUMENT);
        PYE_REQUIRE(batch.size <= (len - batch.at) / batch.count, PYE_E_ARGUMENT);
        PYE_REQUIRE((size_t)batch.size * batch.count == len - batch.at, PYE_E_ARGUMENT);
    } else {
        const size_t end = PYE_BATCH_HEADER_SIZE + (size_t)batch.count * 8;
        PYE_REQUIRE(batch.size == 0 && all_zero(data + end, batch.at - end), PYE_E_ARGUMENT);
        PYE_CHECK(check_table(&batch, len, reply));
    }
    *out = batch;
    rc = PYE_OK;
done:
    return rc;
}

int pye_batch_next(pye_batch *batch, const uint8_t **item, size_t *item_len, uint32_t *tag)
{
    uint64_t word = batch->size;

    if (batch->place >= batch->count) {
        *item = NULL;
        *item_len = 0;
        return 0;
    }
    if (batch->form == PYE_BATCH_TABLE) {
        word = table_word(batch, batch->place);
    }
    *item = batch->data + batch->at;
    *item_len = (size_t)(word & LENGTH_MASK);
    *tag = (uint32_t)(word >> TAG_SHIFT);
    batch->at = round_up(batch->at + *item_len, batch->align);
    batch->place++;
    return 1;
}

void pye_batch_head(uint8_t *out, uint32_t form, uint32_t count, uint64_t size, uint32_t budget_ms)
{
    const size_t end = PYE_BATCH_HEADER_SIZE + (form == PYE_BATCH_TABLE ? (size_t)count * 8 : 0);

    memset(out, 0, PYE_BATCH_HEADER_SIZE);
    memset(out + end, 0, pye_batch_start(form, count) - end);
    memcpy(out, &count, 4);
    memcpy(out + 4, &form, 4);
    memcpy(out + 8, &size, 8);
    memcpy(out + 16, &budget_ms, 4);
}

void pye_batch_set(uint8_t *out, uint32_t place, uint32_t tag, uint64_t len)
{
    const uint64_t word = (uint64_t)tag << TAG_SHIFT | len;

    memcpy(out + PYE_BATCH_HEADER_SIZE + (size_t)place * 8, &word, 8);
}

pye_status pye_batch_native(void *function, const uint8_t **reply, size_t *reply_len, size_t *used,
                            uint8_t *arena, size_t arena_cap, const uint8_t *in, size_t in_len,
                            void (*forget)(uint8_t *memory, size_t len))
{
    pye_status rc;
    pye_batch batch;
    native_function call;
    const uint8_t *item;
    size_t item_len;
    uint32_t tag;
    uint32_t place = 0;

    *reply = arena;
    *reply_len = 0;
    *used = 0;
    PYE_CHECK(pye_batch_open(&batch, in, in_len, PYE_BATCH_MAX_ALIGN, 0));
    const size_t start = pye_batch_start(PYE_BATCH_TABLE, batch.count);
    PYE_REQUIRE(start <= arena_cap / 4, PYE_E_LIMIT);
    memcpy(&call, &function, sizeof(call)); /* ISO C has no cast from data to function pointers */
    size_t at = start;
    size_t even = 0; /* the size of all answers so far, if they have one */
    int is_even = 1;
    /* The first item always runs: `start` is far below the half. */
    while (at <= arena_cap / 2 && pye_batch_next(&batch, &item, &item_len, &tag)) {
        const size_t cap = (arena_cap - at) / PYE_BATCH_MAX_ALIGN * PYE_BATCH_MAX_ALIGN;
        size_t len = cap;
        pye_status status = call(item, item_len, arena + at, &len);
        if (PYE_GUARD(status != PYE_OK || len > cap)) { /* BND-06, BND-07 */
            forget(arena + at, cap);
            status = status != PYE_OK ? status : PYE_E_LENGTH;
            memcpy(arena + at, &status, sizeof(status));
            len = sizeof(status);
            tag = PYE_BATCH_STATUS;
            is_even = 0;
        }
        is_even = is_even && (place == 0 || len == even);
        even = len;
        const size_t next = at + round_up(len, PYE_BATCH_MAX_ALIGN);
        /* A function may have written beyond its answer: not into the answer's padding. */
        if (next - at > len) {
            memset(arena + at + len, 0, next - at - len);
        }
        pye_batch_set(arena, place, tag, len);
        at = next;
        place++;
    }
    *used = at;
    if (is_even && place == batch.count && even % PYE_BATCH_MAX_ALIGN == 0) {
        uint8_t *head = arena + start - PYE_BATCH_HEADER_SIZE;
        pye_batch_head(head, PYE_BATCH_EVEN, place, even, 0);
        *reply = head;
        *reply_len = at - (start - PYE_BATCH_HEADER_SIZE);
        return PYE_OK;
    }
    for (; place < batch.count; place++) {
        pye_batch_set(arena, place, PYE_BATCH_NOT_RUN, 0);
    }
    pye_batch_head(arena, PYE_BATCH_TABLE, batch.count, 0, 0);
    *reply_len = at;
    rc = PYE_OK;
done:
    return rc;
}

pye_status pye_batch_gather(pye_batch *batch, uint8_t *out, size_t out_len, uint64_t size)
{
    pye_status rc;
    const uint8_t *item;
    size_t item_len;
    uint32_t tag;
    uint8_t *to = out;

    const uint64_t left = batch->count - batch->place;
    PYE_REQUIRE(left == 0 ? out_len == 0 : size <= out_len / left && size * left == out_len,
                PYE_E_LENGTH);
    while (pye_batch_next(batch, &item, &item_len, &tag)) {
        PYE_REQUIRE(tag == PYE_BATCH_ITEM && item_len == size, PYE_E_LENGTH);
        if (item_len > 0) {
            memcpy(to, item, item_len);
            to += item_len;
        }
    }
    rc = PYE_OK;
done:
    if (rc != PYE_OK && out_len > 0) {
        memset(out, 0, out_len);
    }
    return rc;
}
