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

static inline v16 v_load_i8(const int8_t *p) { v16 r; HIRE_LOOP r.l[l] = (float)p[l]; return r; }
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

/* A macro: GCC takes a function that only prefetches for one without effect and drops its calls. */
#if defined(__GNUC__)
#define prefetch(p) __builtin_prefetch(p)
#else
#define prefetch(p) ((void)(p))
#endif

#endif
