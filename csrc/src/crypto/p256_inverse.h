/*
 * p256_inverse.h - inverses modulo the order of P-256, in time that depends on the number.
 *
 * Bernstein and Yang, "Fast constant-time gcd computation and modular inversion" (CHES 2019): 62
 * division steps at a time on the low words of f and g give a matrix, which is then applied to the
 * whole of f and g, and modulo the order to d and e, with d x = f and e x = g (mod n) throughout.
 * When g is 0, f is 1 or -1. Here a step ends early and zero bits are skipped, so this is for public
 * data only: see ecdsa.h.
 */
#ifndef PYENCLAVE_P256_INVERSE_H
#define PYENCLAVE_P256_INVERSE_H

#include <stdint.h>

/* Five words of 62 bits; the top one has the sign. */
typedef struct {
    int64_t w[5];
} wide;

/* 2^62 (f, g) after 62 steps is this matrix times (f, g) before; |u| + |v|, |q| + |r| <= 2^62. */
typedef struct {
    int64_t u, v, q, r;
} matrix;

__extension__ typedef __int128 int128;

#define WORD_MASK ((1ULL << 62) - 1)
#define MOST_BATCHES 14

/* n, and -1 / n modulo 2^62 */
static const wide ORDER_WIDE = {{
    0x33b9cac2fc632551, 0x339beab69c5e7a13, 0x3ffffffffffffffb,
    0x3fffffc00000003f, 0x00000000000000ff,
}};
#define ORDER_INVERSE 0x0cd1c8aaee00bc4fULL

static int64_t division_steps(int64_t delta, uint64_t f, uint64_t g, matrix *out)
{
    uint64_t u = 1, v = 0, q = 0, r = 1;
    int left = 62;

    for (;;) {
        const int zeros = __builtin_ctzll(g | 1ULL << left);
        g >>= zeros;
        u <<= zeros;
        v <<= zeros;
        delta += zeros;
        left -= zeros;
        if (left == 0) {
            break;
        }
        if (delta > 0) {
            const uint64_t f_ = f, u_ = u, v_ = v;
            delta = -delta;
            f = g;
            g = 0 - f_;
            u = q;
            q = 0 - u_;
            v = r;
            r = 0 - v_;
        }
        g += f;
        q += u;
        r += v;
    }
    out->u = (int64_t)u;
    out->v = (int64_t)v;
    out->q = (int64_t)q;
    out->r = (int64_t)r;
    return delta;
}

/* (a x + b y) / 2^62; with the order times a number below 2^62 added so that this is exact */
static wide combined(int64_t a, const wide *x, int64_t b, const wide *y, uint64_t inverse)
{
    int128 sum = (int128)a * x->w[0] + (int128)b * y->w[0];
    const int64_t times = (int64_t)(((uint64_t)sum * inverse) & WORD_MASK);
    wide out;

    sum += (int128)times * ORDER_WIDE.w[0];
    sum >>= 62;
    for (int i = 1; i < 5; i++) {
        sum += (int128)a * x->w[i] + (int128)b * y->w[i] + (int128)times * ORDER_WIDE.w[i];
        out.w[i - 1] = (int64_t)((uint64_t)sum & WORD_MASK);
        sum >>= 62;
    }
    out.w[4] = (int64_t)sum;
    return out;
}

/* a + sign * the order */
static wide with_order(const wide *a, int64_t sign)
{
    int64_t carry = 0;
    wide out;

    for (int i = 0; i < 5; i++) {
        const int64_t word = a->w[i] + sign * ORDER_WIDE.w[i] + carry;
        out.w[i] = i < 4 ? (int64_t)((uint64_t)word & WORD_MASK) : word;
        carry = word >> 62;
    }
    return out;
}

/* 1 / x modulo the order, in 0 to n - 1; 0 if there is none. */
static wide inverse_of(const wide *x)
{
    const wide zero = {{0}};
    wide f = ORDER_WIDE, g = *x, d = zero, e = {{1, 0, 0, 0, 0}}, sum;
    int64_t delta = 1;
    int batches = 0;

    while (g.w[0] | g.w[1] | g.w[2] | g.w[3] | g.w[4]) {
        matrix m;
        if (++batches > MOST_BATCHES) {
            return zero;
        }
        delta = division_steps(delta, (uint64_t)f.w[0], (uint64_t)g.w[0], &m);
        sum = combined(m.u, &f, m.v, &g, 0);
        g = combined(m.q, &f, m.r, &g, 0);
        f = sum;
        /* Each time d and e grow by the order at most: fourteen of it at the end. */
        sum = combined(m.u, &d, m.v, &e, ORDER_INVERSE);
        e = combined(m.q, &d, m.r, &e, ORDER_INVERSE);
        d = sum;
    }
    if (f.w[4] < 0) {
        d = combined(-((int64_t)1 << 62), &d, 0, &zero, 0);
    }
    while (d.w[4] < 0) {
        d = with_order(&d, 1);
    }
    for (;;) {
        sum = with_order(&d, -1);
        if (sum.w[4] < 0) {
            return d;
        }
        d = sum;
    }
}

#endif
