/* Sixteen floats at a time in plain C: the level that is always there. */
#ifndef HIRE_SIMD_H
#define HIRE_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define HIRE_SPECIALISED 0
#define HIRE_UNROLL /* sixteen lanes are a loop already */
#define HIRE_LOOP for (int l = 0; l < 16; l++)

typedef struct {
    float l[16];
} v16;
typedef struct {
    uint32_t l[16];
} w16;

static inline v16 v_set1(float a) { v16 r; HIRE_LOOP r.l[l] = a; return r; }
static inline v16 v_load(const float *p) { v16 r; memcpy(&r, p, sizeof r); return r; }
/* Four floats, four times. */
static inline v16 v_four(const float *p) { v16 r; HIRE_LOOP r.l[l] = p[l % 4]; return r; }
static inline void v_store(float *p, v16 a) { memcpy(p, &a, sizeof a); }
static inline v16 v_add(v16 a, v16 b) { HIRE_LOOP a.l[l] += b.l[l]; return a; }
static inline v16 v_sub(v16 a, v16 b) { HIRE_LOOP a.l[l] -= b.l[l]; return a; }
static inline v16 v_mul(v16 a, v16 b) { HIRE_LOOP a.l[l] *= b.l[l]; return a; }
static inline v16 v_div(v16 a, v16 b) { HIRE_LOOP a.l[l] /= b.l[l]; return a; }
static inline v16 v_fma(v16 a, v16 b, v16 c) { HIRE_LOOP c.l[l] += a.l[l] * b.l[l]; return c; }
/* As on x86, the second operand comes back when either is NaN. */
static inline v16 v_max(v16 a, v16 b) { HIRE_LOOP if (a.l[l] > b.l[l]) b.l[l] = a.l[l]; return b; }
static inline v16 v_min(v16 a, v16 b) { HIRE_LOOP if (a.l[l] < b.l[l]) b.l[l] = a.l[l]; return b; }
static inline v16 v_sqrt(v16 a) { HIRE_LOOP a.l[l] = sqrtf(a.l[l]); return a; }
static inline v16 v_abs(v16 a) { HIRE_LOOP a.l[l] = fabsf(a.l[l]); return a; }
/* To the nearest integer, for |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. */
static inline v16 v_round(v16 a)
{
    HIRE_LOOP a.l[l] += 12582912.0f;
    HIRE_LOOP a.l[l] -= 12582912.0f;
    return a;
}

/* 2^a for whole numbers in [-126, 127]. */
static inline v16 v_pow2(v16 a)
{
    w16 bits;
    HIRE_LOOP bits.l[l] = (uint32_t)((int32_t)a.l[l] + 127) << 23;
    memcpy(&a, &bits, sizeof a);
    return a;
}

static inline float v_sum(v16 a)
{
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++) a.l[l] += a.l[l + half];
    return a.l[0];
}

/* The sums of the lower eight lanes of sixteen vectors, and of the upper ones. */
static inline void v_halves(const v16 *x, v16 *low, v16 *high)
{
    for (int i = 0; i < 16; i++) {
        float quarter[4];
        for (int q = 0; q < 4; q++) {
            const float *l = x[i].l + 4 * q;
            quarter[q] = (l[0] + l[2]) + (l[1] + l[3]);
        }
        low->l[i] = quarter[0] + quarter[1];
        high->l[i] = quarter[2] + quarter[3];
    }
}

/* The largest lane. */
static inline float v_most(v16 a)
{
    for (int l = 1; l < 16; l++) a.l[0] = a.l[l] > a.l[0] ? a.l[l] : a.l[0];
    return a.l[0];
}

/* The largest of each four lanes, in all of them. */
static inline v16 v_most_of_four(v16 a)
{
    v16 r;
    for (int q = 0; q < 16; q += 4) {
        float most = a.l[q];
        for (int l = q + 1; l < q + 4; l++) most = a.l[l] > most ? a.l[l] : most;
        for (int l = q; l < q + 4; l++) r.l[l] = most;
    }
    return r;
}

static inline int v_finite(v16 a)
{
    int finite = 1;
    HIRE_LOOP finite &= fabsf(a.l[l]) < INFINITY;
    return finite;
}

static inline float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits;
    float value;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = sign | ((magnitude << 13) + (112u << 23));
    } else {
        value = (float)magnitude * (1.0f / 16777216.0f);
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline v16 v_load_f16(const void *p)
{
    uint16_t half[16];
    v16 r;
    memcpy(half, p, sizeof half);
    HIRE_LOOP r.l[l] = half_to_float(half[l]);
    return r;
}

static inline v16 v_load_bf16(const void *p)
{
    uint16_t half[16];
    w16 bits;
    v16 r;
    memcpy(half, p, sizeof half);
    HIRE_LOOP bits.l[l] = (uint32_t)half[l] << 16;
    memcpy(&r, &bits, sizeof r);
    return r;
}

static inline w16 w_load4(const uint8_t *p) { w16 r; memcpy(&r, p, sizeof r); return r; }
static inline w16 w_load2(const uint8_t *p)
{
    uint16_t part[16];
    w16 r;
    memcpy(part, p, sizeof part);
    HIRE_LOOP r.l[l] = part[l];
    return r;
}
static inline w16 w_load1(const uint8_t *p) { w16 r; HIRE_LOOP r.l[l] = p[l]; return r; }

/* The codes that start `shift` bits up in every lane, less the middle code: sums of numbers around
 * zero lose less than sums of codes from which as large a number is taken off. */
static inline v16 v_code(w16 a, int shift, int bits)
{
    const uint32_t mask = (1u << bits) - 1u;
    v16 r;
    const float middle = (float)(int32_t)mask / 2;
    HIRE_LOOP r.l[l] = (float)(int32_t)(a.l[l] >> shift & mask) - middle;
    return r;
}

/* ------------------------------------------------------------------ whole numbers in 32-bit lanes */

static inline w16 w_set1(int32_t a) { w16 r; HIRE_LOOP r.l[l] = (uint32_t)a; return r; }
static inline w16 w_add(w16 a, w16 b) { HIRE_LOOP a.l[l] += b.l[l]; return a; }
static inline w16 w_and(w16 a, w16 b) { HIRE_LOOP a.l[l] &= b.l[l]; return a; }
static inline w16 w_or(w16 a, w16 b) { HIRE_LOOP a.l[l] |= b.l[l]; return a; }
static inline w16 w_xor(w16 a, w16 b) { HIRE_LOOP a.l[l] ^= b.l[l]; return a; }
static inline w16 w_left(w16 a, int shift) { HIRE_LOOP a.l[l] <<= shift; return a; }
static inline w16 w_right(w16 a, int shift) { HIRE_LOOP a.l[l] >>= shift; return a; }
static inline void w_store(void *p, w16 a) { memcpy(p, &a, sizeof a); }
static inline v16 v_from_w(w16 a) { v16 r; HIRE_LOOP r.l[l] = (float)(int32_t)a.l[l]; return r; }
/* To the nearest, ties to even, for |a| < 2^23; some number for the others. */
static inline w16 w_round(v16 a)
{
    w16 r;
    a = v_max(v_min(a, v_set1(8388607.0f)), v_set1(-8388607.0f)); /* NaN goes */
    HIRE_LOOP {
        const float half = a.l[l] < 0.0f ? -0.5f : 0.5f;
        const int32_t away = (int32_t)(a.l[l] + half);
        const int tie = (float)away - a.l[l] == half;
        r.l[l] = (uint32_t)(away - (tie && (away & 1) ? (away < 0 ? -1 : 1) : 0));
    }
    return r;
}
/* Adds to every lane the products of its four bytes, up to 127 and not negative, with the four
 * signed ones at p. */
static inline w16 w_dot(w16 sum, w16 codes, const int8_t *p)
{
    /* Two halves of a lane at a time: products and sums of two fit 16 bits. */
    const uint32_t even = (uint16_t)p[0] | (uint32_t)(uint16_t)p[2] << 16;
    const uint32_t odd = (uint16_t)p[1] | (uint32_t)(uint16_t)p[3] << 16;
    w16 code0, code1, factor0, factor1;
    int16_t a[32], b[32], c[32], d[32];
    HIRE_LOOP code0.l[l] = codes.l[l] & 0xff00ff;
    HIRE_LOOP code1.l[l] = codes.l[l] >> 8 & 0xff00ff;
    HIRE_LOOP factor0.l[l] = even;
    HIRE_LOOP factor1.l[l] = odd;
    memcpy(a, &code0, sizeof a);
    memcpy(b, &factor0, sizeof b);
    memcpy(c, &code1, sizeof c);
    memcpy(d, &factor1, sizeof d);
    for (int i = 0; i < 32; i++) a[i] = (int16_t)(a[i] * b[i] + c[i] * d[i]);
    memcpy(&code0, a, sizeof a);
    HIRE_LOOP sum.l[l] += (uint32_t)((int32_t)(code0.l[l] << 16) >> 16);
    HIRE_LOOP sum.l[l] += (uint32_t)((int32_t)code0.l[l] >> 16);
    return sum;
}
/* Adds to every lane the products of its four bytes, each less BYTE_TAKEN, with the four signed ones
 * at p. The highest bit goes by itself: sums of two products fit 16 bits. */
enum { BYTE_TAKEN = 0 };
static inline w16 w_dot_bytes(w16 sum, w16 bytes, const int8_t *p)
{
    sum = w_dot(sum, w_and(bytes, w_set1(0x7f7f7f7f)), p);
    return w_dot(sum, w_and(bytes, w_set1((int32_t)0x80808080)), p);
}
/* The same where every lane has four signed bytes of its own, at p + 4 l. */
static inline w16 w_dot_each(w16 sum, w16 codes, const int8_t *p)
{
    HIRE_LOOP {
        int32_t dot = 0;
        for (int i = 0; i < 4; i++) dot += (int32_t)(codes.l[l] >> 8 * i & 255) * p[4 * l + i];
        sum.l[l] += (uint32_t)dot;
    }
    return sum;
}
/* Lane `place` of the table, which is less than 8. */
static inline v16 v_lookup(v16 table, w16 place)
{
    v16 r;
    HIRE_LOOP r.l[l] = table.l[place.l[l] & 7];
    return r;
}
/* Of each four lanes the lowest bytes side by side, then the next bytes, to the highest. */
static inline w16 w_by_byte(w16 a)
{
    w16 r = w_set1(0);
    HIRE_LOOP for (int k = 0; k < 4; k++)
        r.l[l / 4 * 4 + k] |= (a.l[l] >> 8 * k & 255) << 8 * (l % 4);
    return r;
}
/* Byte 16 q + 4 r + i in lane 4 q + i. */
static inline w16 w_bytes(w16 x, int r)
{
    w16 y;
    HIRE_LOOP y.l[l] = x.l[l / 4 * 4 + r] >> 8 * (l % 4) & 255;
    return y;
}
/* Bytes 16 q + 4 r + i of the four rows side by side in lane 4 q + i of out[r]. */
static inline void w_interleave(const w16 *row, w16 *out)
{
    for (int r = 0; r < 4; r++)
        HIRE_LOOP {
            const int lane = l / 4 * 4 + r, shift = 8 * (l % 4);
            out[r].l[l] = 0;
            for (int k = 0; k < 4; k++) out[r].l[l] |= (row[k].l[lane] >> shift & 255) << 8 * k;
        }
}
/* Every byte of the codes, less than 16, as the table has it. */
static inline w16 w_table(const uint8_t *table, w16 codes)
{
    w16 r = w_set1(0);
    HIRE_LOOP for (int k = 0; k < 32; k += 8)
        r.l[l] |= (uint32_t)table[codes.l[l] >> k & 15] << k;
    return r;
}
/* Counts, lane by lane, where x > y; both signed. */
static inline w16 w_count_above(w16 count, w16 x, w16 y)
{
    HIRE_LOOP count.l[l] += (int32_t)x.l[l] > (int32_t)y.l[l];
    return count;
}
/* A bit for every lane where x > y (both signed), and where x = y. */
static inline unsigned w_above(w16 x, w16 y)
{
    unsigned bits = 0;
    HIRE_LOOP bits |= (unsigned)((int32_t)x.l[l] > (int32_t)y.l[l]) << l;
    return bits;
}
static inline unsigned w_equal(w16 x, w16 y)
{
    unsigned bits = 0;
    HIRE_LOOP bits |= (unsigned)(x.l[l] == y.l[l]) << l;
    return bits;
}
/* Writes `first` plus the places of the bits, ascending; returns where the next go. */
static inline int32_t *w_places(int32_t *out, unsigned bits, int32_t first)
{
    for (; bits; bits >>= 1, first++)
        if (bits & 1) *out++ = first;
    return out;
}

/* A macro: GCC takes a function that only prefetches for one without effect and drops its calls. */
#if defined(__GNUC__)
#define prefetch(p) __builtin_prefetch(p)
#define prefetch_far(p) __builtin_prefetch(p, 0, 2)
#else
#define prefetch(p) ((void)(p))
#define prefetch_far(p) ((void)(p))
#endif

#endif
