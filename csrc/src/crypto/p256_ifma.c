/*
 * p256_ifma.c - ECDSA verification on P-256, four lanes wide. For public data only: see ecdsa.h.
 *
 * The signature (r, s) over e is valid if the x coordinate of (e/s) G + (r/s) Q is r modulo n (FIPS
 * 186-5, 6.4.2). Points are Jacobian; formulas: "dbl-2001-b", "add-1998-cmo-2" and "madd" of the
 * Explicit-Formulas Database. They are not complete, and need not be: an addition of a point to
 * itself or to its negative gives Z = 0, every later step keeps Z = 0, and Z = 0 at the end is
 * PYE_P256_DOUBT. Infinity as a start is a mask beside the point.
 *
 * (1) A multiple of a point with a table (G always; known keys) is a sum of 43 entries, no
 * doublings: the lanes take every fourth one and are added up at the end. (2) Keys without a table
 * are multiplied by windows of 5 bits, one key a lane.
 */
#include "base/check.h"
#include "crypto/p256_ifma.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512ifma,bmi,bmi2")
#include "crypto/p256_field_ifma.h"
#include "crypto/p256_inverse.h"

#include <stdlib.h>
#include <string.h>

#define COMB_BITS 6
#define COMB_WINDOWS 43
#define COMB_ENTRIES 32
#define KEY_BITS 5
#define KEY_WINDOWS 52
#define KEY_ENTRIES 16
#define AFFINE (2 * LIMBS)
#define JACOBIAN (3 * LIMBS)

_Static_assert(sizeof(pye_p256_points) ==
                   sizeof(uint64_t) * COMB_WINDOWS * COMB_ENTRIES * AFFINE,
               "the table has one affine point an entry");

/* R^2 modulo n; b of the curve's equation, times R; G */
static const uint64_t N_R2[LIMBS] = {
    0x5cc0dea6dc3ba, 0x192a067d8a084, 0xbec59615571bb, 0x1fc245b2392b6, 0x0e12d9559d956,
};
static const uint64_t CURVE_B[LIMBS] = {
    0xdf6229c4bddfd, 0xca8843090d89c, 0x212ed6acf005c, 0x83415a220abf7, 0x0c30061dd4874,
};
static const uint8_t PRIME[32] = {
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
};
static const uint8_t ORDER[32] = {
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
};
/* p - n, big-endian: an r below it may stand for the x coordinate r + n */
static const uint8_t WRAP[32] = {
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x43, 0x19, 0x05, 0x53, 0x58, 0xe8, 0x61, 0x7b, 0x0c, 0x46, 0x35, 0x3d, 0x03, 0x9c, 0xda, 0xae,
};

/* Four numbers in memory: row i is limb i of each. */
typedef struct {
    _Alignas(32) uint64_t row[LIMBS][LANES];
} lanes;

/* A Jacobian point in each lane, and the lanes that are at infinity. */
typedef struct {
    fe x, y, z;
    __mmask8 infinity;
} point;

static vec load_row(const uint64_t *row)
{
    return _mm256_load_si256((const vec *)(const void *)row);
}

static void store_row(uint64_t *row, vec from)
{
    _mm256_store_si256((vec *)(void *)row, from);
}

static vec gather(const uint64_t *from, vec index)
{
    return _mm256_i64gather_epi64((const long long *)(const void *)from, index, 8);
}

static fe load(const lanes *from)
{
    fe out;

    for (int i = 0; i < LIMBS; i++) {
        out.l[i] = load_row(from->row[i]);
    }
    return out;
}

static void store(lanes *to, const fe *from)
{
    for (int i = 0; i < LIMBS; i++) {
        store_row(to->row[i], from->l[i]);
    }
}

/* Put a big-endian number of 32 bytes into a lane. */
static void put(lanes *to, size_t lane, const uint8_t bytes[32])
{
    uint64_t w[4];

    for (int i = 0; i < 4; i++) {
        uint64_t word;
        memcpy(&word, bytes + 24 - 8 * i, 8);
        w[i] = __builtin_bswap64(word);
    }
    to->row[0][lane] = w[0] & LIMB_MASK;
    to->row[1][lane] = (w[0] >> 52 | w[1] << 12) & LIMB_MASK;
    to->row[2][lane] = (w[1] >> 40 | w[2] << 24) & LIMB_MASK;
    to->row[3][lane] = (w[2] >> 28 | w[3] << 36) & LIMB_MASK;
    to->row[4][lane] = w[3] >> 16;
}

/* ---- points ------------------------------------------------------------------------------- */

/* 2^times a. In a point X and Y are below 1.2 p and Z below 4 p; behind each step is what it is
 * below, in units of p. Z^2 of the next doubling is made while X and Y of this one are waited for. */
static point doubled(const point *a, int times)
{
    point out = *a;
    fe delta = fe_sqr(&out.z);                                       /* 2 */

    for (int i = 0; i < times; i++) {
        const fe difference = fe_three_times_minus(&out.x, &delta);  /* 9.6 */
        const fe sum = fe_add(&out.x, &delta);                       /* 3.2 */
        const fe alpha = fe_mul(&difference, &sum);                  /* 3 */
        const fe gamma = fe_sqr(&out.y);                             /* 1.1 */
        const fe yz = fe_mul(&out.y, &out.z);                        /* 1.3 */
        const fe beta = fe_mul(&out.x, &gamma);                      /* 1.1 */
        const fe square = fe_sqr(&alpha), zero = fe_zero();          /* 1.6 */

        out.x = fe_sub(&square, &zero, &beta, 3);
        const fe rest = fe_minus(&beta, 2, &out.x);                  /* 6.4 */
        const fe product = fe_mul(&alpha, &rest);                    /* 2.2 */
        out.z = fe_add(&yz, &yz);
        delta = fe_sqr(&out.z);
        const fe gamma2 = fe_sqr(&gamma);                            /* 1.1 */
        out.y = fe_sub(&product, &zero, &gamma2, 3);
    }
    return out;
}

/* The common end of both additions: U1, S1, H, S2 - S1, and Z1 Z2. */
static INLINE point added(const fe *u1, const fe *s1, const fe *h, const fe *r, const fe *zz)
{
    const fe hh = fe_sqr(h), rr = fe_sqr(r);                     /* 1.7, 1.8 */
    const fe hhh = fe_mul(h, &hh), v = fe_mul(u1, &hh);          /* 1.4, 1.2 */
    point out;

    out.x = fe_sub(&rr, &hhh, &v, 1);
    const fe rest = fe_minus(&v, 0, &out.x);                     /* 3.2 */
    const fe left = fe_mul(r, &rest), right = fe_mul(s1, &hhh);  /* 1.7, 1.2 */
    const fe zero = fe_zero();
    out.y = fe_sub(&left, &right, &zero, 0);
    out.z = fe_mul(zz, h);
    out.infinity = 0;
    return out;
}

/* `b` in the lanes of `which`, else `a` */
static INLINE point chosen(__mmask8 which, const point *a, const point *b)
{
    point out;

    out.x = fe_blend(which, &a->x, &b->x);
    out.y = fe_blend(which, &a->y, &b->y);
    out.z = fe_blend(which, &a->z, &b->z);
    out.infinity = (__mmask8)((a->infinity & ~which) | (b->infinity & which));
    return out;
}

static point add(const point *a, const point *b)
{
    const fe za = fe_sqr(&a->z), zb = fe_sqr(&b->z), za3 = fe_mul(&a->z, &za);
    const fe zb3 = fe_mul(&b->z, &zb), u1 = fe_mul(&a->x, &zb), u2 = fe_mul(&b->x, &za);
    const fe s1 = fe_mul(&a->y, &zb3), s2 = fe_mul(&b->y, &za3), zz = fe_mul(&a->z, &b->z);
    const fe h = fe_minus(&u2, 0, &u1), r = fe_minus(&s2, 0, &s1); /* 3.2, 3.4 */
    point sum = added(&u1, &s1, &h, &r, &zz);

    if (a->infinity | b->infinity) {
        sum = chosen(b->infinity, &sum, a);
        sum = chosen(a->infinity, &sum, b);
    }
    return sum;
}

/* a + (x, y); in the lanes of `none` just a */
static point add_affine(const point *a, const fe *x, const fe *y, __mmask8 none)
{
    const fe za = fe_sqr(&a->z), za3 = fe_mul(&a->z, &za);
    const fe u2 = fe_mul(x, &za), s2 = fe_mul(y, &za3);
    const fe h = fe_minus(&u2, 0, &a->x), r = fe_minus(&s2, 0, &a->y); /* 3.2 */
    point sum = added(&a->x, &a->y, &h, &r, &a->z);

    if (a->infinity | none) {
        const point other = {*x, *y, fe_set(P_ONE), 0};
        sum = chosen(a->infinity, &sum, &other);
        sum = chosen(none, &sum, a);
    }
    return sum;
}

static point at_infinity(void)
{
    const point out = {fe_zero(), fe_zero(), fe_zero(), ALL_LANES};

    return out;
}

/* Lanes whose (x, y) is on the curve: y^2 = x^3 - 3 x + b. */
static __mmask8 on_curve(const fe *x, const fe *y)
{
    const fe xx = fe_sqr(x), yy = fe_sqr(y), one = fe_set(P_ONE), b = fe_set(CURVE_B);
    const fe two = fe_add(&one, &one), zero = fe_zero();
    fe left = fe_sub(&xx, &one, &two, 0);

    left = fe_mul(&left, x);
    left = fe_add(&left, &b);
    left = fe_sub(&left, &yy, &zero, 0);
    return fe_is_zero(&left);
}

/* 1 / a modulo p, times R^2, of a times R: a^(p - 2) */
static fe inverted(const fe *a)
{
    fe out = *a;

    for (int bit = 254; bit >= 0; bit--) {
        const unsigned byte = (unsigned)(31 - bit / 8);
        const unsigned value = byte == 31 ? 0xfdu : PRIME[byte];
        out = fe_sqr(&out);
        if (value >> (bit % 8) & 1) {
            out = fe_mul(&out, a);
        }
    }
    return out;
}

/* ---- scalars ------------------------------------------------------------------------------ */

static fe fe_from_lane(const fe *a, vec order)
{
    fe out;

    for (int i = 0; i < LIMBS; i++) {
        out.l[i] = _mm256_permutexvar_epi64(order, a->l[i]);
    }
    return out;
}

/* R / a modulo n, of a that is 0 in no lane: one inversion of the product of all lanes. */
static fe sc_inverted(const fe *a)
{
    const vec neighbour = _mm256_set_epi64x(2, 3, 0, 1), across = _mm256_set_epi64x(1, 0, 3, 2);
    const fe next = fe_from_lane(a, neighbour), pair = sc_mul(a, &next);
    const fe others = fe_from_lane(&pair, across), all = sc_mul(&pair, &others);
    const fe rest = sc_mul(&next, &others), r2 = fe_set(N_R2);
    lanes product;
    uint64_t limb[LIMBS];
    wide number;
    fe out;

    store(&product, &all);
    for (int i = 0; i < LIMBS; i++) {
        limb[i] = product.row[i][0];
    }
    number.w[0] = (int64_t)((limb[0] | limb[1] << 52) & WORD_MASK);
    number.w[1] = (int64_t)((limb[1] >> 10 | limb[2] << 42) & WORD_MASK);
    number.w[2] = (int64_t)((limb[2] >> 20 | limb[3] << 32) & WORD_MASK);
    number.w[3] = (int64_t)((limb[3] >> 30 | limb[4] << 22) & WORD_MASK);
    number.w[4] = (int64_t)(limb[4] >> 40);
    number = inverse_of(&number);
    limb[0] = (uint64_t)number.w[0] & LIMB_MASK;
    limb[1] = ((uint64_t)number.w[0] >> 52 | (uint64_t)number.w[1] << 10) & LIMB_MASK;
    limb[2] = ((uint64_t)number.w[1] >> 42 | (uint64_t)number.w[2] << 20) & LIMB_MASK;
    limb[3] = ((uint64_t)number.w[2] >> 32 | (uint64_t)number.w[3] << 30) & LIMB_MASK;
    limb[4] = ((uint64_t)number.w[3] >> 22 | (uint64_t)number.w[4] << 40) & LIMB_MASK;
    out = fe_set(limb); /* R^3 over the product */
    out = sc_mul(&out, &rest);
    return sc_mul(&out, &r2);
}

/* Write lane `lane` of a scalar as digits of `bits` bits, from -2^(bits-1) + 1 to 2^(bits-1). */
static void recode(int8_t *digits, int windows, int bits, const lanes *from, size_t lane)
{
    int carry = 0;

    for (int i = 0; i < windows; i++) {
        const int at = i * bits, limb = at / 52, shift = at % 52;
        uint64_t word = limb < LIMBS ? from->row[limb][lane] >> shift : 0;
        if (shift + bits > 52 && limb + 1 < LIMBS) {
            word |= from->row[limb + 1][lane] << (52 - shift);
        }
        int digit = (int)(word & ((1u << bits) - 1)) + carry;
        carry = digit > 1 << (bits - 1);
        digits[i] = (int8_t)(digit - (carry << bits));
    }
}

/* ---- tables ------------------------------------------------------------------------------- */

#define GROUPS ((COMB_WINDOWS + LANES - 1) / LANES)

/* Multiples 1 to 32 of the windows' points; four windows are lanes. They wait with their Z, and
 * with the product of all Z before them, until all are made affine by one inversion. */
typedef struct {
    _Alignas(32) uint64_t rows[GROUPS * COMB_ENTRIES][JACOBIAN][LANES];
    fe before[GROUPS * COMB_ENTRIES];
} multiples;

static void keep(uint64_t rows[JACOBIAN][LANES], const point *from)
{
    for (int i = 0; i < LIMBS; i++) {
        store_row(rows[i], from->x.l[i]);
        store_row(rows[LIMBS + i], from->y.l[i]);
        store_row(rows[2 * LIMBS + i], from->z.l[i]);
    }
}

static point kept(uint64_t rows[JACOBIAN][LANES])
{
    point out;

    for (int i = 0; i < LIMBS; i++) {
        out.x.l[i] = load_row(rows[i]);
        out.y.l[i] = load_row(rows[LIMBS + i]);
        out.z.l[i] = load_row(rows[2 * LIMBS + i]);
    }
    out.infinity = 0;
    return out;
}

static void make_affine(pye_p256_points *to, multiples *of)
{
    fe product = fe_set(P_ONE), inverse;

    for (size_t i = 0; i < GROUPS * COMB_ENTRIES; i++) {
        const fe z = kept(of->rows[i]).z;
        of->before[i] = product;
        product = fe_mul(&product, &z);
    }
    inverse = inverted(&product);
    for (size_t i = GROUPS * COMB_ENTRIES; i-- > 0;) {
        const point p = kept(of->rows[i]);
        const fe own = fe_mul(&inverse, &of->before[i]), zz = fe_sqr(&own), zzz = fe_mul(&zz, &own);
        const fe px = fe_mul(&p.x, &zz), py = fe_mul(&p.y, &zzz);
        const size_t first = i / COMB_ENTRIES * LANES;
        lanes x, y;
        store(&x, &px);
        store(&y, &py);
        inverse = fe_mul(&inverse, &p.z);
        for (size_t lane = 0; lane < LANES && first + lane < COMB_WINDOWS; lane++) {
            uint64_t *entry = to->entry[first + lane][i % COMB_ENTRIES];
            for (int limb = 0; limb < LIMBS; limb++) {
                entry[limb] = x.row[limb][lane];
                entry[LIMBS + limb] = y.row[limb][lane];
            }
        }
    }
}

int pye_p256_points_make(pye_p256_points *to, const uint8_t key[PYE_P256_KEY_SIZE])
{
    const fe r2 = fe_set(P_R2);
    lanes x, y;
    multiples *all;
    point base;

    PYE_REFUSE_IF(memcmp(key, PRIME, 32) >= 0 || memcmp(key + 32, PRIME, 32) >= 0, 0);
    for (size_t lane = 0; lane < LANES; lane++) {
        put(&x, lane, key);
        put(&y, lane, key + 32);
    }
    base.x = load(&x);
    base.y = load(&y);
    base.x = fe_mul(&base.x, &r2);
    base.y = fe_mul(&base.y, &r2);
    base.z = fe_set(P_ONE);
    base.infinity = 0;
    PYE_REFUSE_IF(on_curve(&base.x, &base.y) != ALL_LANES, 0);
    all = aligned_alloc(64, (sizeof(*all) + 63) / 64 * 64);
    PYE_REFUSE_IF(!all, 0);
    for (size_t group = 0; group < GROUPS; group++) {
        uint64_t(*rows)[JACOBIAN][LANES] = all->rows + group * COMB_ENTRIES;
        point windows = base, sum;
        for (int lane = 1; lane <= LANES; lane++) {
            base = doubled(&base, COMB_BITS);
            windows = chosen((__mmask8)(ALL_LANES << lane & ALL_LANES), &windows, &base);
        }
        keep(rows[0], &windows);
        sum = doubled(&windows, 1);
        keep(rows[1], &sum);
        for (size_t i = 2; i < COMB_ENTRIES; i++) {
            sum = add(&sum, &windows);
            keep(rows[i], &sum);
        }
    }
    make_affine(to, all);
    free(all); /* public */
    return 1;
}

/* Add the multiple that `digits` say of the table's point: lane k takes windows k, k + 4, ... */
static point comb(point sum, const pye_p256_points *table, const int8_t digits[COMB_WINDOWS])
{
    for (size_t first = 0; first < COMB_WINDOWS; first += LANES) {
        _Alignas(32) uint64_t at[LANES];
        __mmask8 negative = 0, none = 0;
        fe x, y;

        for (size_t lane = 0; lane < LANES; lane++) {
            const size_t window = first + lane;
            const int digit = window < COMB_WINDOWS ? digits[window] : 0;
            const size_t size = (size_t)(digit < 0 ? -digit : digit);
            negative |= (__mmask8)((digit < 0) << lane);
            none |= (__mmask8)((digit == 0) << lane);
            at[lane] = digit ? (window * COMB_ENTRIES + size - 1) * AFFINE : 0;
        }
        const vec index = load_row(at);
        const uint64_t *entries = table->entry[0][0];
        for (int i = 0; i < LIMBS; i++) {
            x.l[i] = gather(entries + i, index);
            y.l[i] = gather(entries + LIMBS + i, index);
        }
        y = fe_negated(negative, &y);
        sum = add_affine(&sum, &x, &y, none);
    }
    return sum;
}

/* Ask for the entries that `comb` is going to take: they are all over the table. */
static void fetch(const pye_p256_points *table, const int8_t digits[COMB_WINDOWS])
{
    for (size_t window = 0; window < COMB_WINDOWS; window++) {
        const int digit = digits[window], size = digit < 0 ? -digit : digit;
        const char *entry = (const char *)table->entry[window][size ? size - 1 : 0];
        _mm_prefetch(entry, _MM_HINT_T0);
        _mm_prefetch(entry + sizeof(table->entry[0][0]) - 1, _MM_HINT_T0);
    }
}

/* Add all lanes of `a`; lane 0 has the sum. */
static point total(point a)
{
    for (int half = LANES / 2; half; half /= 2) {
        const vec order = V_ADD(_mm256_set_epi64x(3, 2, 1, 0), v_set((uint64_t)half));
        point other;
        other.x = fe_from_lane(&a.x, order);
        other.y = fe_from_lane(&a.y, order);
        other.z = fe_from_lane(&a.z, order);
        other.infinity = (__mmask8)(a.infinity >> half);
        a = add(&a, &other);
    }
    return a;
}

/* ---- keys without a table ----------------------------------------------------------------- */

/* The multiples 1 to 16 of the point in each lane. */
typedef struct {
    _Alignas(32) uint64_t rows[KEY_ENTRIES][JACOBIAN][LANES];
} key_multiples;

/* The multiple of each lane's point that its digits say. */
static point multiplied(const point *base, int8_t digits[LANES][KEY_WINDOWS], int windows)
{
    key_multiples table;
    point sum = *base;

    keep(table.rows[0], &sum);
    for (size_t i = 1; i < KEY_ENTRIES; i++) {
        if (i % 2) {
            sum = kept(table.rows[i / 2]);
            sum = doubled(&sum, 1);
        } else {
            sum = add(&sum, base);
        }
        keep(table.rows[i], &sum);
    }
    sum = at_infinity();
    for (int window = windows - 1; window >= 0; window--) {
        _Alignas(32) uint64_t at[LANES];
        __mmask8 negative = 0, none = 0;
        point other;

        if (window < windows - 1) {
            sum = doubled(&sum, KEY_BITS);
        }
        for (size_t lane = 0; lane < LANES; lane++) {
            const int digit = digits[lane][window];
            const size_t size = (size_t)(digit < 0 ? -digit : digit);
            negative |= (__mmask8)((digit < 0) << lane);
            none |= (__mmask8)((digit == 0) << lane);
            at[lane] = (digit ? size - 1 : 0) * JACOBIAN * LANES + lane;
        }
        const vec index = load_row(at);
        for (int i = 0; i < LIMBS; i++) {
            const uint64_t *row = table.rows[0][i];
            other.x.l[i] = gather(row, index);
            other.y.l[i] = gather(row + LIMBS * LANES, index);
            other.z.l[i] = gather(row + 2 * LIMBS * LANES, index);
        }
        other.y = fe_negated(negative, &other.y);
        other.infinity = none;
        sum = add(&sum, &other);
    }
    return sum;
}

/* The same for lanes 0 and 1 only: lanes 2 and 3 take the upper halves of the digits, for the points
 * times 2^130, so that there are half as many additions. */
static point multiplied_by_halves(const point *base, int8_t digits[LANES][KEY_WINDOWS])
{
    const vec twice = _mm256_set_epi64x(1, 0, 1, 0), upper = _mm256_set_epi64x(3, 2, 3, 2);
    int8_t halves[LANES][KEY_WINDOWS];
    point both = *base, lifted, sum, high;

    for (size_t lane = 0; lane < LANES; lane++) {
        memcpy(halves[lane], digits[lane % 2] + lane / 2 * (KEY_WINDOWS / 2), KEY_WINDOWS / 2);
    }
    both.x = fe_from_lane(&both.x, twice);
    both.y = fe_from_lane(&both.y, twice);
    lifted = doubled(&both, KEY_WINDOWS / 2 * KEY_BITS);
    both = chosen(0xc, &both, &lifted);
    sum = multiplied(&both, halves, KEY_WINDOWS / 2);
    high.x = fe_from_lane(&sum.x, upper);
    high.y = fe_from_lane(&sum.y, upper);
    high.z = fe_from_lane(&sum.z, upper);
    high.infinity = (__mmask8)(sum.infinity >> 2);
    return add(&sum, &high);
}

/* ---- verification ------------------------------------------------------------------------- */

static int is_zero(const uint8_t number[32])
{
    uint8_t any = 0;

    for (int i = 0; i < 32; i++) {
        any |= number[i];
    }
    return any == 0;
}

/* Whether R and S are 1 to n - 1. */
static int in_range(const uint8_t signature[PYE_P256_SIGNATURE_SIZE])
{
    const uint8_t *s = signature + 32;

    return !is_zero(signature) && !is_zero(s) && memcmp(signature, ORDER, 32) < 0 &&
           memcmp(s, ORDER, 32) < 0;
}

static void put_point(lanes to[3], size_t lane, const point *from)
{
    const fe *numbers[3] = {&from->x, &from->y, &from->z};

    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < LIMBS; i++) {
            to[k].row[i][lane] =
                (uint64_t)_mm256_extract_epi64(numbers[k]->l[i], 0);
        }
    }
}

/* u1 = e / s and u2 = r / s of all lanes */
static void scalars(lanes *u1, lanes *u2, const lanes *e, const lanes *r, const lanes *s)
{
    fe a = load(s), b = load(e), c = load(r);

    a = sc_inverted(&a); /* R / s */
    b = sc_mul(&b, &a);  /* R is gone */
    c = sc_mul(&c, &a);
    store(u1, &b);
    store(u2, &c);
}

void pye_p256_verify_four(uint8_t *verdicts, const pye_p256_points *generator,
                           const pye_p256_claim *claims, size_t count)
{
    lanes e = {{{0}}}, r = {{{0}}}, s = {{{0}}}, x = {{{0}}}, y = {{{0}}}, wrapped = {{{0}}};
    lanes u1, u2, sums[3];
    int8_t by_generator[LANES][COMB_WINDOWS], by_table[LANES][COMB_WINDOWS];
    int8_t by_key[LANES][KEY_WINDOWS] = {{0}}; /* those with a table stay 0: other digits, smaller */
    __mmask8 judged = 0, without_table = 0, wraps = 0, infinity = 0, points;
    const fe r2 = fe_set(P_R2);

    memset(sums, 0, sizeof(sums));
    for (size_t i = 0; i < LANES; i++) {
        s.row[0][i] = 1;
    }
    for (size_t i = 0; i < count; i++) {
        const __mmask8 bit = (__mmask8)(1u << i);
        const uint8_t *key = claims[i].key;
        verdicts[i] = PYE_P256_INVALID;
        if (PYE_GUARD(!in_range(claims[i].signature))) {
            continue;
        }
        if (claims[i].table == NULL) {
            if (PYE_GUARD(memcmp(key, PRIME, 32) >= 0 || memcmp(key + 32, PRIME, 32) >= 0)) {
                verdicts[i] = PYE_P256_DOUBT;
                continue;
            }
            put(&x, i, key);
            put(&y, i, key + 32);
            without_table |= bit;
        }
        judged |= bit;
        put(&e, i, claims[i].digest);
        put(&r, i, claims[i].signature);
        put(&s, i, claims[i].signature + 32);
        if (memcmp(claims[i].signature, WRAP, 32) < 0) {
            put(&wrapped, i, ORDER);
            wraps |= bit;
        }
    }
    if (!judged) {
        return;
    }
    scalars(&u1, &u2, &e, &r, &s);
    for (size_t i = 0; i < count; i++) {
        recode(by_generator[i], COMB_WINDOWS, COMB_BITS, &u1, i);
        fetch(generator, by_generator[i]);
        if (claims[i].table) {
            recode(by_table[i], COMB_WINDOWS, COMB_BITS, &u2, i);
            fetch(&claims[i].table->points, by_table[i]);
        } else {
            recode(by_key[i], KEY_WINDOWS, KEY_BITS, &u2, i);
        }
    }
    for (size_t i = 0; i < count; i++) {
        point sum = comb(at_infinity(), generator, by_generator[i]);
        if (claims[i].table) {
            sum = comb(sum, &claims[i].table->points, by_table[i]);
        }
        sum = total(sum);
        put_point(sums, i, &sum);
        infinity |= (__mmask8)((sum.infinity & 1) << i);
    }
    point sum = {load(&sums[0]), load(&sums[1]), load(&sums[2]), infinity};
    points = (__mmask8)~without_table;
    if (without_table) {
        fe qx = load(&x), qy = load(&y);
        qx = fe_mul(&qx, &r2);
        qy = fe_mul(&qy, &r2);
        points |= on_curve(&qx, &qy);
        const point base = {qx, qy, fe_set(P_ONE), 0};
        point product = without_table < 4 ? multiplied_by_halves(&base, by_key)
                                          : multiplied(&base, by_key, KEY_WINDOWS);
        product = add(&product, &sum);
        sum = chosen(without_table, &sum, &product);
    }

    /* x = X / Z^2 is r, or r + n where that is below p */
    const fe zero = fe_zero(), z = fe_sub(&sum.z, &zero, &zero, 0), zz = fe_sqr(&sum.z);
    fe wanted = load(&r), more = load(&wrapped), difference;
    wanted = fe_mul(&wanted, &r2);
    wanted = fe_mul(&wanted, &zz);
    difference = fe_sub(&wanted, &sum.x, &zero, 0);
    __mmask8 equal = fe_is_zero(&difference);
    more = fe_mul(&more, &r2);
    more = fe_mul(&more, &zz);
    difference = fe_add(&difference, &more);
    difference = fe_sub(&difference, &zero, &zero, 0);
    equal |= fe_is_zero(&difference) & wraps;
    const __mmask8 doubt = (__mmask8)(fe_is_zero(&z) | sum.infinity | ~points);
    for (size_t i = 0; i < count; i++) {
        if (judged >> i & 1) {
            verdicts[i] = PYE_P256_INVALID;
            if (PYE_GUARD(doubt >> i & 1)) {
                verdicts[i] = PYE_P256_DOUBT;
            } else if (equal >> i & 1) {
                verdicts[i] = PYE_P256_VALID;
            }
        }
    }
}
#else
typedef int pye_p256_ifma_is_for_x86; /* ISO C wants a declaration */
#endif
