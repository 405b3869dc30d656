/* What the head needs beside simd_neon.h; as in head_simd.h. */
#ifndef HIRE_HEAD_SIMD_H
#define HIRE_HEAD_SIMD_H

typedef struct {
    float64x2_t q[8];
} d16;

static inline w16 h_zero(void) { return w_set1(0); }
static inline w16 h_word(int32_t word) { return w_set1(word); }
static inline w16 h_load_half(const void *p)
{
    const uint8_t *byte = p;
    return (w16){q_word(byte), q_word(byte + 16), vdupq_n_s32(0), vdupq_n_s32(0)};
}
static inline w16 h_add(w16 x, w16 y) { return w_add(x, y); }
static inline w16 h_low(w16 x) { return w_and(x, w_set1(0x0f0f0f0f)); }
static inline w16 h_high(w16 x) { return h_low(w_right(x, 4)); }
static inline w16 h_dot_nibbles(w16 sum, w16 codes, w16 x)
{
    return (w16){q_dot(sum.a, codes.a, x.a), q_dot(sum.b, codes.b, x.b),
                 q_dot(sum.c, codes.c, x.c), q_dot(sum.d, codes.d, x.d)};
}
/* Codes are bytes without sign, which no instruction that is always there multiplies with signed
 * ones. */
static inline w16 h_dot(w16 sum, w16 codes, w16 x)
{
    const w16 high = h_dot_nibbles(h_zero(), h_high(codes), x);
    return w_add(h_dot_nibbles(sum, h_low(codes), x), w_left(high, 4));
}
static inline v16 h_float(w16 x) { return v_from_w(x); }
static inline int64_t h_sum(w16 x)
{
    return vaddlvq_s32(x.a) + vaddlvq_s32(x.b) + vaddlvq_s32(x.c) + vaddlvq_s32(x.d);
}
static inline float h_max(v16 x) { return v_most(x); }
static inline d16 d_load(const double *p)
{
    return (d16){{vld1q_f64(p), vld1q_f64(p + 2), vld1q_f64(p + 4), vld1q_f64(p + 6),
                  vld1q_f64(p + 8), vld1q_f64(p + 10), vld1q_f64(p + 12), vld1q_f64(p + 14)}};
}
static inline void d_store(double *p, d16 x)
{
    for (int i = 0; i < 8; i++) vst1q_f64(p + 2 * i, x.q[i]);
}
static inline d16 d_add(d16 x, d16 y)
{
    for (int i = 0; i < 8; i++) x.q[i] = vaddq_f64(x.q[i], y.q[i]);
    return x;
}
static inline float64x2_t d_low(float32x4_t x, float32x4_t y)
{
    return vmulq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_f64_f32(vget_low_f32(y)));
}
static inline float64x2_t d_high(float32x4_t x, float32x4_t y)
{
    return vmulq_f64(vcvt_high_f64_f32(x), vcvt_high_f64_f32(y));
}
static inline d16 d_times(v16 x, v16 y)
{
    return (d16){{d_low(x.a, y.a), d_high(x.a, y.a), d_low(x.b, y.b), d_high(x.b, y.b),
                  d_low(x.c, y.c), d_high(x.c, y.c), d_low(x.d, y.d), d_high(x.d, y.d)}};
}

#endif
