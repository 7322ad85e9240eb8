/*
 * p256_field_ifma.h - four numbers at once modulo the prime and the order of P-256.
 *
 * A number has five limbs of 52 bits; limb i of number k is lane k of vector i. Products are
 * Montgomery's with R = 2^260: product(a, b) = a b / R. Limbs are below 2^52 except in the
 * middle of a function. Values are kept modulo p but not below it: there is room up to 16 p, and a
 * product of a < i p and b < j p is below (i j / 16 + 1) p. Folded means below p + 2^232.
 * Gueron and Krasnov, "Software implementation of modular exponentiation, using advanced vector
 * instructions architectures" (2012), has the limbs; the reduction uses the form of p below.
 *
 * For public data only: see ecdsa.h.
 */
#ifndef PYENCLAVE_P256_FIELD_IFMA_H
#define PYENCLAVE_P256_FIELD_IFMA_H

#include <immintrin.h>
#include <stdint.h>

/* One function made of these is what pays: calls would pass everything through memory. */
#define INLINE inline __attribute__((always_inline))

#define LIMBS 5
#define LANES 4
#define ALL_LANES 0xf
#define LIMB_MASK 0xfffffffffffffULL

typedef __m256i vec;
typedef struct {
    vec l[LIMBS];
} fe;

static INLINE vec v_set(uint64_t value)
{
    return _mm256_set1_epi64x((long long)value);
}
#define V_ADD(a, b) _mm256_add_epi64((a), (b))
#define V_SUB(a, b) _mm256_sub_epi64((a), (b))
#define V_AND(a, b) _mm256_and_si256((a), (b))
#define V_SHL(a, n) _mm256_slli_epi64((a), (n))
#define V_SHR(a, n) _mm256_srli_epi64((a), (n))
#define V_SAR(a, n) _mm256_srai_epi64((a), (n))
#define V_LO(acc, a, b) _mm256_madd52lo_epu64((acc), (a), (b))
#define V_HI(acc, a, b) _mm256_madd52hi_epu64((acc), (a), (b))

/* p = 2^256 - 2^224 + 2^192 + 2^96 - 1 */
static const uint64_t P[LIMBS] = {
    0xfffffffffffff, 0x00fffffffffff, 0x0000000000000, 0x0001000000000, 0x0ffffffff0000,
};
/* R^2 mod p */
static const uint64_t P_R2[LIMBS] = {
    0x0000000000300, 0xffffffff00000, 0xffffefffffffb, 0xfdfffffffffff, 0x0000004ffffff,
};
/* R mod p: one */
static const uint64_t P_ONE[LIMBS] = {
    0x0000000000010, 0xf000000000000, 0xfffffffffffff, 0xffeffffffffff, 0x00000000fffff,
};
/* n, the order; n^-1 mod 2^52, negated; R^2 mod n; R mod n */
static const uint64_t N[LIMBS] = {
    0x9cac2fc632551, 0xada7179e84f3b, 0xfffffffbce6fa, 0x0000fffffffff, 0x0ffffffff0000,
};
#define N_INVERSE 0x1c8aaee00bc4fULL

/* The carry pass of `t`, whose limbs are signed and whose value is not negative. */
static INLINE fe fe_carried(const vec t[LIMBS])
{
    const vec mask = v_set(LIMB_MASK);
    vec carry = _mm256_setzero_si256();
    fe out;

    for (int i = 0; i < LIMBS - 1; i++) {
        const vec limb = V_ADD(t[i], carry);
        out.l[i] = V_AND(limb, mask);
        carry = V_SAR(limb, 52);
    }
    out.l[LIMBS - 1] = V_ADD(t[LIMBS - 1], carry);
    return out;
}

/* Montgomery's reduction of ten columns modulo p. As p = -1 mod 2^52, a limb is its own factor m
 * (products take the low 52 bits of their factors), and m p = m (2^256 - 2^224 + 2^192 + 2^96) - m
 * clears it with three more limbs: 2^44 2^52, 2^36 2^156 and p[4] 2^208. */
static INLINE fe fe_reduced(vec t[2 * LIMBS])
{
    const vec p1 = v_set(1ULL << 44), p3 = v_set(P[3]), p4 = v_set(P[4]);

    for (int i = 0; i < LIMBS; i++) {
        const vec m = t[i];
        t[i + 1] = V_ADD(V_LO(t[i + 1], m, p1), V_SHR(m, 52));
        t[i + 2] = V_HI(t[i + 2], m, p1);
        t[i + 3] = V_LO(t[i + 3], m, p3);
        t[i + 4] = V_LO(V_HI(t[i + 4], m, p3), m, p4);
        t[i + 5] = V_HI(t[i + 5], m, p4);
    }
    return fe_carried(t + LIMBS);
}

#define ZERO_COLUMNS(t)                                                                            \
    vec t[2 * LIMBS];                                                                              \
    for (int k = 0; k < 2 * LIMBS; k++) {                                                          \
        t[k] = _mm256_setzero_si256();                                                             \
    }

static INLINE fe fe_mul(const fe *a, const fe *b)
{
    ZERO_COLUMNS(lo)
    ZERO_COLUMNS(hi)
    for (int i = 0; i < LIMBS; i++) {
        for (int j = 0; j < LIMBS; j++) {
            lo[i + j] = V_LO(lo[i + j], a->l[i], b->l[j]);
            hi[i + j + 1] = V_HI(hi[i + j + 1], a->l[i], b->l[j]);
        }
    }
    for (int k = 0; k < 2 * LIMBS; k++) {
        lo[k] = V_ADD(lo[k], hi[k]);
    }
    return fe_reduced(lo);
}

static INLINE fe fe_sqr(const fe *a)
{
    ZERO_COLUMNS(t)
    ZERO_COLUMNS(u)
    for (int i = 0; i < LIMBS; i++) {
        for (int j = i + 1; j < LIMBS; j++) {
            t[i + j] = V_LO(t[i + j], a->l[i], a->l[j]);
            u[i + j + 1] = V_HI(u[i + j + 1], a->l[i], a->l[j]);
        }
    }
    for (int k = 0; k < 2 * LIMBS; k++) {
        t[k] = V_ADD(t[k], u[k]);
        t[k] = V_ADD(t[k], t[k]);
    }
    for (int i = 0; i < LIMBS; i++) {
        t[2 * i] = V_LO(t[2 * i], a->l[i], a->l[i]);
        t[2 * i + 1] = V_HI(t[2 * i + 1], a->l[i], a->l[i]);
    }
    return fe_reduced(t);
}

/* A value modulo p whose limbs are out of their range: 0 <= value < 2^262, limbs 0 to 3 above
 * -2^50. What is above 2^256 is folded first, then carried; the result is below 2^256 + 2^231. */
static INLINE fe fe_folded(vec t[LIMBS])
{
    const vec q = V_SAR(t[4], 48);

    t[4] = V_ADD(V_AND(t[4], v_set(0xffffffffffff)), V_SHL(q, 16));
    t[0] = V_ADD(t[0], q);
    t[1] = V_SUB(t[1], V_SHL(q, 44));
    t[3] = V_SUB(t[3], V_SHL(q, 36));
    return fe_carried(t);
}

/* 32 p in limbs that stay positive when nine numbers below 2 p are taken from them. */
static const uint64_t P_32[LIMBS] = {
    (1ULL << 57) - 32,
    (1ULL << 49) - 32 + (1ULL << 56),
    (1ULL << 56) - 16,
    (1ULL << 41) + (1ULL << 56) - 16,
    (1ULL << 53) - (1ULL << 21) - 16,
};

/* a + b, for numbers whose sum is below 16 p; not folded */
static INLINE fe fe_add(const fe *a, const fe *b)
{
    vec t[LIMBS];

    for (int i = 0; i < LIMBS; i++) {
        t[i] = V_ADD(a->l[i], b->l[i]);
    }
    return fe_carried(t);
}

/* (a << shift) - b + 2 p, for b below 2 p; not folded */
static INLINE fe fe_minus(const fe *a, int shift, const fe *b)
{
    vec t[LIMBS];

    for (int i = 0; i < LIMBS; i++) {
        t[i] = V_ADD(V_SUB(V_SHL(a->l[i], shift), b->l[i]), v_set(2 * P[i]));
    }
    return fe_carried(t);
}

/* 3 (a - b) + 6 p, for b below 2 p; not folded */
static INLINE fe fe_three_times_minus(const fe *a, const fe *b)
{
    vec t[LIMBS];

    for (int i = 0; i < LIMBS; i++) {
        const vec d = V_ADD(V_SUB(a->l[i], b->l[i]), v_set(2 * P[i]));
        t[i] = V_ADD(V_ADD(d, d), d);
    }
    return fe_carried(t);
}

/* a - b - (c << shift), folded; shift 0 to 3 */
static INLINE fe fe_sub(const fe *a, const fe *b, const fe *c, int shift)
{
    vec t[LIMBS];

    for (int i = 0; i < LIMBS; i++) {
        const vec d = V_ADD(V_SUB(a->l[i], b->l[i]), v_set(P_32[i]));
        t[i] = V_SUB(d, V_SHL(c->l[i], shift));
    }
    return fe_folded(t);
}

static INLINE fe fe_set(const uint64_t limbs[LIMBS])
{
    fe out;

    for (int i = 0; i < LIMBS; i++) {
        out.l[i] = v_set(limbs[i]);
    }
    return out;
}

static INLINE fe fe_zero(void)
{
    fe out;

    for (int i = 0; i < LIMBS; i++) {
        out.l[i] = _mm256_setzero_si256();
    }
    return out;
}

/* b where `which` has a bit, else a */
static INLINE fe fe_blend(__mmask8 which, const fe *a, const fe *b)
{
    fe out;

    for (int i = 0; i < LIMBS; i++) {
        out.l[i] = _mm256_mask_blend_epi64(which, a->l[i], b->l[i]);
    }
    return out;
}

/* -a where `which` has a bit, else a */
static INLINE fe fe_negated(__mmask8 which, const fe *a)
{
    const fe zero = fe_zero(), negative = fe_sub(&zero, a, &zero, 0);

    return fe_blend(which, a, &negative);
}

/* Lanes that are zero modulo p, of a number that came out of fe_folded: it is 0 or p then. */
static INLINE __mmask8 fe_is_zero(const fe *a)
{
    __mmask8 zero = ALL_LANES, prime = ALL_LANES;

    for (int i = 0; i < LIMBS; i++) {
        zero &= _mm256_cmpeq_epi64_mask(a->l[i], _mm256_setzero_si256());
        prime &= _mm256_cmpeq_epi64_mask(a->l[i], v_set(P[i]));
    }
    return (__mmask8)(zero | prime);
}

/* a b / R modulo n */
static INLINE fe sc_mul(const fe *a, const fe *b)
{
    const vec inverse = v_set(N_INVERSE);
    ZERO_COLUMNS(t)

    for (int i = 0; i < LIMBS; i++) {
        for (int j = 0; j < LIMBS; j++) {
            t[i + j] = V_LO(t[i + j], a->l[i], b->l[j]);
            t[i + j + 1] = V_HI(t[i + j + 1], a->l[i], b->l[j]);
        }
    }
    for (int i = 0; i < LIMBS; i++) {
        /* t[i] + m n[0] has 52 zero bits at its end: what it carries is t[i] / 2^52 rounded up. */
        const vec m = V_LO(_mm256_setzero_si256(), t[i], inverse);
        const vec carry = V_SHR(V_ADD(t[i], v_set(LIMB_MASK)), 52);
        const vec high = V_HI(carry, m, v_set(N[0]));
        t[i + 1] = V_ADD(V_LO(t[i + 1], m, v_set(N[1])), high);
        t[i + 2] = V_HI(t[i + 2], m, v_set(N[1]));
        for (int j = 2; j < LIMBS; j++) {
            t[i + j] = V_LO(t[i + j], m, v_set(N[j]));
            t[i + j + 1] = V_HI(t[i + j + 1], m, v_set(N[j]));
        }
    }
    return fe_carried(t + LIMBS);
}

#endif
