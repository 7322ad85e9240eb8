/* msgpack.c - the shape of a MessagePack value, checked before a decoder sees it (SER-02).
 * https://github.com/msgpack/msgpack/blob/master/spec.md */
#include "base/check.h"
#include "pyenclave/call.h"

#define DEPTH 64

typedef struct {
    const uint8_t *at;
    size_t left;
} cursor;

static int skip(cursor *c, uint64_t len)
{
    PYE_REFUSE_IF(len > c->left, 0);
    c->at += len;
    c->left -= (size_t)len;
    return 1;
}

/* A big-endian number of 1, 2 or 4 bytes. */
static int number(cursor *c, unsigned width, uint64_t *out)
{
    uint64_t value = 0;

    PYE_REFUSE_IF(width > c->left, 0);
    for (unsigned i = 0; i < width; i++) {
        value = value << 8 | c->at[i];
    }
    *out = value;
    return skip(c, width);
}

/* Take one head and what belongs to it; `items` is how many values follow inside. */
static int value(cursor *c, uint64_t *items, int *nested)
{
    static const uint8_t widths[] = {1, 2, 4};
    uint64_t n = 0;

    *items = 0;
    *nested = 0;
    PYE_REFUSE_IF(c->left == 0, 0);
    const uint8_t head = *c->at;
    c->at++;
    c->left--;
    if (head <= 0x7f || head >= 0xe0 || head == 0xc0 || head == 0xc2 || head == 0xc3) {
        return 1;
    }
    if (head <= 0x8f || (head <= 0x9f && head >= 0x90)) { /* fixmap, fixarray */
        *nested = 1;
        *items = (uint64_t)(head & 0x0f) * (head <= 0x8f ? 2 : 1);
        return 1;
    }
    if (head <= 0xbf) { /* fixstr */
        return skip(c, head & 0x1f);
    }
    switch (head) {
    case 0xc4: /* bin */
    case 0xc5:
    case 0xc6:
        return number(c, widths[head - 0xc4], &n) && skip(c, n);
    case 0xd9: /* str */
    case 0xda:
    case 0xdb:
        return number(c, widths[head - 0xd9], &n) && skip(c, n);
    case 0xca: /* float */
        return skip(c, 4);
    case 0xcb:
        return skip(c, 8);
    case 0xcc: /* unsigned and signed integers */
    case 0xcd:
    case 0xce:
    case 0xcf:
        return skip(c, (uint64_t)1 << (head - 0xcc));
    case 0xd0:
    case 0xd1:
    case 0xd2:
    case 0xd3:
        return skip(c, (uint64_t)1 << (head - 0xd0));
    case 0xd6: /* timestamps: extension type -1 of 4, 8 or 12 bytes */
        return c->left > 0 && *c->at == 0xff && skip(c, 5);
    case 0xd7:
        return c->left > 0 && *c->at == 0xff && skip(c, 9);
    case 0xc7:
        return c->left > 1 && c->at[0] == 12 && c->at[1] == 0xff && skip(c, 14);
    case 0xdc: /* array */
    case 0xdd:
        *nested = 1;
        return number(c, head == 0xdc ? 2 : 4, items);
    case 0xde: /* map */
    case 0xdf:
        *nested = 1;
        PYE_REFUSE_IF(!number(c, head == 0xde ? 2 : 4, &n), 0);
        *items = n * 2;
        return 1;
    default:
        return 0;
    }
}

pye_status pye_msgpack_check(const uint8_t *data, size_t len, uint32_t max_depth)
{
    cursor c = {data, len};
    uint64_t open[DEPTH];
    uint64_t total = 0;
    uint32_t depth = 0;

    PYE_REFUSE_IF(max_depth == 0 || max_depth > DEPTH, PYE_E_ARGUMENT);
    do {
        uint64_t items;
        int nested;

        PYE_REFUSE_IF(!value(&c, &items, &nested), PYE_E_ARGUMENT);
        PYE_REFUSE_IF(items > c.left, PYE_E_ARGUMENT); /* each needs a byte at least */
        total += items;
        PYE_REFUSE_IF(total > PYE_MSGPACK_MAX_ITEMS || (nested && depth == max_depth), PYE_E_LIMIT);
        if (items > 0) {
            open[depth++] = items;
        } else {
            while (depth > 0 && --open[depth - 1] == 0) {
                depth--;
            }
        }
    } while (depth > 0);
    PYE_REFUSE_IF(c.left != 0, PYE_E_ARGUMENT);
    return PYE_OK;
}
