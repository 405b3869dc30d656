/* Sixteen floats at a time as four NEON registers, which every 64-bit ARM has. HIRE_DOTPROD: with
 * its instructions for sums of products of bytes (FEAT_DotProd). */
#ifndef HIRE_SIMD_H
#define HIRE_SIMD_H

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define HIRE_SPECIALISED 1
#if defined(__clang__)
#define HIRE_UNROLL _Pragma("clang loop unroll(enable)")
#else
#define HIRE_UNROLL _Pragma("GCC unroll 16")
#endif

typedef struct {
    float32x4_t a, b, c, d;
} v16;
typedef struct {
    int32x4_t a, b, c, d;
} w16;

#define HIRE_EACH(type, op, x) ((type){op((x).a), op((x).b), op((x).c), op((x).d)})
#define HIRE_BOTH(type, op, x, y) \
    ((type){op((x).a, (y).a), op((x).b, (y).b), op((x).c, (y).c), op((x).d, (y).d)})

/* Sixteen bytes from any place. */
static inline uint8x16_t q_load(const void *p) { return vld1q_u8(p); }
static inline float32x4_t q_float(const void *p) { return vreinterpretq_f32_u8(q_load(p)); }
static inline int32x4_t q_word(const void *p) { return vreinterpretq_s32_u8(q_load(p)); }

static inline v16 v_set1(float a)
{
    const float32x4_t x = vdupq_n_f32(a);
    return (v16){x, x, x, x};
}
static inline v16 v_load(const float *p)
{
    return (v16){q_float(p), q_float(p + 4), q_float(p + 8), q_float(p + 12)};
}
/* Four floats, four times. */
static inline v16 v_four(const float *p)
{
    const float32x4_t x = q_float(p);
    return (v16){x, x, x, x};
}
static inline void v_store(float *p, v16 x)
{
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
static inline v16 v_add(v16 x, v16 y) { return HIRE_BOTH(v16, vaddq_f32, x, y); }
static inline v16 v_sub(v16 x, v16 y) { return HIRE_BOTH(v16, vsubq_f32, x, y); }
static inline v16 v_mul(v16 x, v16 y) { return HIRE_BOTH(v16, vmulq_f32, x, y); }
static inline v16 v_div(v16 x, v16 y) { return HIRE_BOTH(v16, vdivq_f32, x, y); }
/* As on x86, the second operand comes back when either is NaN. */
static inline float32x4_t q_max(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
static inline float32x4_t q_min(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
static inline v16 v_max(v16 x, v16 y) { return HIRE_BOTH(v16, q_max, x, y); }
static inline v16 v_min(v16 x, v16 y) { return HIRE_BOTH(v16, q_min, x, y); }
static inline v16 v_fma(v16 x, v16 y, v16 z)
{
    return (v16){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
                 vfmaq_f32(z.d, x.d, y.d)};
}
static inline v16 v_sqrt(v16 x) { return HIRE_EACH(v16, vsqrtq_f32, x); }
static inline v16 v_abs(v16 x) { return HIRE_EACH(v16, vabsq_f32, x); }
static inline v16 v_round(v16 x) { return HIRE_EACH(v16, vrndnq_f32, x); }
static inline float32x4_t q_pow2(float32x4_t x)
{
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
/* 2^x for whole numbers in [-126, 127]. */
static inline v16 v_pow2(v16 x) { return HIRE_EACH(v16, q_pow2, x); }
static inline float v_sum(v16 x)
{
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
/* Of two vectors, in each quarter: lanes 0 + 2 of x and of y, then lanes 1 + 3. */
static inline float32x4_t q_pairs(float32x4_t x, float32x4_t y)
{
    return vaddq_f32(vzip1q_f32(x, y), vzip2q_f32(x, y));
}
/* The sums of four quarters. */
static inline float32x4_t q_sums(float32x4_t x, float32x4_t y, float32x4_t z, float32x4_t w)
{
    const float64x2_t a = vreinterpretq_f64_f32(q_pairs(x, y));
    const float64x2_t b = vreinterpretq_f64_f32(q_pairs(z, w));
    return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)),
                     vreinterpretq_f32_f64(vzip2q_f64(a, b)));
}
static inline float32x4_t q_lower(const v16 *x)
{
    return vaddq_f32(q_sums(x[0].a, x[1].a, x[2].a, x[3].a),
                     q_sums(x[0].b, x[1].b, x[2].b, x[3].b));
}
static inline float32x4_t q_upper(const v16 *x)
{
    return vaddq_f32(q_sums(x[0].c, x[1].c, x[2].c, x[3].c),
                     q_sums(x[0].d, x[1].d, x[2].d, x[3].d));
}
/* The sums of the lower eight lanes of sixteen vectors, and of the upper ones. */
static inline void v_halves(const v16 *x, v16 *low, v16 *high)
{
    *low = (v16){q_lower(x), q_lower(x + 4), q_lower(x + 8), q_lower(x + 12)};
    *high = (v16){q_upper(x), q_upper(x + 4), q_upper(x + 8), q_upper(x + 12)};
}
/* The largest lane. */
static inline float v_most(v16 x)
{
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d)));
}
static inline float32x4_t q_most(float32x4_t x) { return vdupq_n_f32(vmaxvq_f32(x)); }
/* The largest of each four lanes, in all of them. */
static inline v16 v_most_of_four(v16 x) { return HIRE_EACH(v16, q_most, x); }
static inline uint32x4_t q_finite(float32x4_t x)
{
    return vcltq_f32(vabsq_f32(x), vdupq_n_f32(INFINITY));
}
static inline int v_finite(v16 x)
{
    const uint32x4_t ab = vandq_u32(q_finite(x.a), q_finite(x.b));
    const uint32x4_t cd = vandq_u32(q_finite(x.c), q_finite(x.d));
    return vminvq_u32(vandq_u32(ab, cd)) != 0;
}
static inline float32x4_t q_f16(const uint8_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
static inline v16 v_load_f16(const void *p)
{
    const uint8_t *byte = p;
    return (v16){q_f16(byte), q_f16(byte + 8), q_f16(byte + 16), q_f16(byte + 24)};
}
static inline float32x4_t q_bf16(const uint8_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
static inline v16 v_load_bf16(const void *p)
{
    const uint8_t *byte = p;
    return (v16){q_bf16(byte), q_bf16(byte + 8), q_bf16(byte + 16), q_bf16(byte + 24)};
}
static inline v16 v_from_w(w16 x) { return HIRE_EACH(v16, vcvtq_f32_s32, x); }
static inline w16 w_load4(const uint8_t *p)
{
    return (w16){q_word(p), q_word(p + 16), q_word(p + 32), q_word(p + 48)};
}
static inline w16 w_widened(uint16x8_t low, uint16x8_t high)
{
    return (w16){vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                 vreinterpretq_s32_u32(vmovl_high_u16(low)),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_high_u16(high))};
}
static inline w16 w_load2(const uint8_t *p)
{
    return w_widened(vreinterpretq_u16_u8(q_load(p)), vreinterpretq_u16_u8(q_load(p + 16)));
}
static inline w16 w_load1(const uint8_t *p)
{
    const uint8x16_t codes = q_load(p);
    return w_widened(vmovl_u8(vget_low_u8(codes)), vmovl_high_u8(codes));
}

/* ------------------------------------------------------------------ whole numbers in 32-bit lanes */

static inline w16 w_set1(int32_t a)
{
    const int32x4_t x = vdupq_n_s32(a);
    return (w16){x, x, x, x};
}
static inline w16 w_add(w16 x, w16 y) { return HIRE_BOTH(w16, vaddq_s32, x, y); }
static inline w16 w_and(w16 x, w16 y) { return HIRE_BOTH(w16, vandq_s32, x, y); }
static inline w16 w_or(w16 x, w16 y) { return HIRE_BOTH(w16, vorrq_s32, x, y); }
static inline w16 w_xor(w16 x, w16 y) { return HIRE_BOTH(w16, veorq_s32, x, y); }
/* To the left, or to the right where `by` is negative. */
static inline int32x4_t q_shift(int32x4_t x, int by)
{
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(by)));
}
static inline w16 w_left(w16 x, int shift)
{
    return (w16){q_shift(x.a, shift), q_shift(x.b, shift), q_shift(x.c, shift),
                 q_shift(x.d, shift)};
}
static inline w16 w_right(w16 x, int shift) { return shift ? w_left(x, -shift) : x; }
static inline void w_store(void *p, w16 x)
{
    uint8_t *byte = p;
    vst1q_u8(byte, vreinterpretq_u8_s32(x.a));
    vst1q_u8(byte + 16, vreinterpretq_u8_s32(x.b));
    vst1q_u8(byte + 32, vreinterpretq_u8_s32(x.c));
    vst1q_u8(byte + 48, vreinterpretq_u8_s32(x.d));
}
/* The codes that start `shift` bits up in every lane, less the middle code. */
static inline v16 v_code(w16 x, int shift, int bits)
{
    const v16 code = v_from_w(w_and(w_right(x, shift), w_set1((1 << bits) - 1)));
    return v_sub(code, v_set1((float)((1 << bits) - 1) / 2));
}
/* To the nearest, ties to even; some number for what is no number. */
static inline w16 w_round(v16 x) { return HIRE_EACH(w16, vcvtnq_s32_f32, x); }
/* Adds to every lane the products of four signed bytes; without HIRE_DOTPROD, no two neighbouring
 * products may add up to 2^15. */
static inline int32x4_t q_dot(int32x4_t sum, int32x4_t x, int32x4_t y)
{
    const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(y);
#if HIRE_DOTPROD
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
/* Adds to every lane the products of its four bytes, up to 127 and not negative, with the four
 * signed ones at p. */
static inline w16 w_dot(w16 sum, w16 codes, const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    const int32x4_t each = vdupq_n_s32(four);
    return (w16){q_dot(sum.a, codes.a, each), q_dot(sum.b, codes.b, each),
                 q_dot(sum.c, codes.c, each), q_dot(sum.d, codes.d, each)};
}
/* Adds to every lane the products of its four bytes, 1 to 255 and each less BYTE_TAKEN, with the
 * four signed ones at p. */
enum { BYTE_TAKEN = 128 };
static inline w16 w_dot_bytes(w16 sum, w16 bytes, const int8_t *p)
{
    return w_dot(sum, w_xor(bytes, w_set1((int32_t)0x80808080)), p);
}
/* The same where every lane has four signed bytes of its own, at p + 4 l. */
static inline w16 w_dot_each(w16 sum, w16 codes, const int8_t *p)
{
    return (w16){q_dot(sum.a, codes.a, q_word(p)), q_dot(sum.b, codes.b, q_word(p + 16)),
                 q_dot(sum.c, codes.c, q_word(p + 32)), q_dot(sum.d, codes.d, q_word(p + 48))};
}
static inline float32x4_t q_lookup(uint8x16x2_t table, int32x4_t place)
{
    /* The four bytes of lane i start at byte 4 i. */
    const int32x4_t byte = vmlaq_s32(vdupq_n_s32(0x03020100), place, vdupq_n_s32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_s32(byte)));
}
/* Lane `place` of the table, which is less than 8. */
static inline v16 v_lookup(v16 table, w16 place)
{
    const uint8x16x2_t low = {{vreinterpretq_u8_f32(table.a), vreinterpretq_u8_f32(table.b)}};
    return (v16){q_lookup(low, place.a), q_lookup(low, place.b), q_lookup(low, place.c),
                 q_lookup(low, place.d)};
}
static inline int32x4_t q_by_byte(int32x4_t x)
{
    static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x), q_load(order)));
}
/* Of each four lanes the lowest bytes side by side, then the next bytes, to the highest. */
static inline w16 w_by_byte(w16 x) { return HIRE_EACH(w16, q_by_byte, x); }
/* Byte 16 q + 4 r + i in lane 4 q + i. */
static inline int32x4_t q_bytes(int32x4_t x, uint8x16_t order)
{
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x), order));
}
static inline w16 w_bytes(w16 x, const int r)
{
    static const int32_t lane[4] = {0, 1, 2, 3}; /* bytes from 16 on become zeros */
    const int32x4_t byte = vaddq_s32(vld1q_s32(lane), vdupq_n_s32(4 * r));
    const uint8x16_t order =
        vreinterpretq_u8_s32(vorrq_s32(byte, vdupq_n_s32((int32_t)0xffffff00)));
    return (w16){q_bytes(x.a, order), q_bytes(x.b, order), q_bytes(x.c, order),
                 q_bytes(x.d, order)};
}
/* Of one quarter of four rows, the vectors r as w_interleave has them. */
static inline int32x4_t q_mix(int32x4_t x, int32x4_t y, int32x4_t z, int32x4_t w, const int r)
{
    const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(y);
    const int8x16_t c = vreinterpretq_s8_s32(z), d = vreinterpretq_s8_s32(w);
    const int16x8_t ab = vreinterpretq_s16_s8(r < 2 ? vzip1q_s8(a, b) : vzip2q_s8(a, b));
    const int16x8_t cd = vreinterpretq_s16_s8(r < 2 ? vzip1q_s8(c, d) : vzip2q_s8(c, d));
    return vreinterpretq_s32_s16(r % 2 == 0 ? vzip1q_s16(ab, cd) : vzip2q_s16(ab, cd));
}
/* Bytes 16 q + 4 r + i of the four rows side by side in lane 4 q + i of out[r]. */
static inline void w_interleave(const w16 *row, w16 *out)
{
HIRE_UNROLL
    for (int r = 0; r < 4; r++)
        out[r] = (w16){q_mix(row[0].a, row[1].a, row[2].a, row[3].a, r),
                       q_mix(row[0].b, row[1].b, row[2].b, row[3].b, r),
                       q_mix(row[0].c, row[1].c, row[2].c, row[3].c, r),
                       q_mix(row[0].d, row[1].d, row[2].d, row[3].d, r)};
}
static inline int32x4_t q_table(uint8x16_t table, int32x4_t codes)
{
    return vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(codes)));
}
/* Every byte of the codes, less than 16, as the table has it. */
static inline w16 w_table(const uint8_t *table, w16 codes)
{
    const uint8x16_t all = q_load(table);
    return (w16){q_table(all, codes.a), q_table(all, codes.b), q_table(all, codes.c),
                 q_table(all, codes.d)};
}
static inline int32x4_t q_above(int32x4_t x, int32x4_t y)
{
    return vreinterpretq_s32_u32(vcgtq_s32(x, y));
}
static inline int32x4_t q_equal(int32x4_t x, int32x4_t y)
{
    return vreinterpretq_s32_u32(vceqq_s32(x, y));
}
/* Counts, lane by lane, where x > y; both signed. */
static inline w16 w_count_above(w16 count, w16 x, w16 y)
{
    const w16 above = HIRE_BOTH(w16, q_above, x, y);
    return HIRE_BOTH(w16, vsubq_s32, count, above);
}
/* A bit for every lane that is all ones and not zero. */
static inline unsigned w_bits(w16 x)
{
    static const int32_t bit[4] = {1, 2, 4, 8};
    const int32x4_t bits = vld1q_s32(bit);
    const int32x4_t low = vorrq_s32(vandq_s32(x.a, bits), vandq_s32(x.b, vshlq_n_s32(bits, 4)));
    const int32x4_t high = vorrq_s32(vandq_s32(x.c, vshlq_n_s32(bits, 8)),
                                     vandq_s32(x.d, vshlq_n_s32(bits, 12)));
    return (unsigned)vaddvq_s32(vorrq_s32(low, high));
}
/* A bit for every lane where x > y (both signed), and where x = y. */
static inline unsigned w_above(w16 x, w16 y) { return w_bits(HIRE_BOTH(w16, q_above, x, y)); }
static inline unsigned w_equal(w16 x, w16 y) { return w_bits(HIRE_BOTH(w16, q_equal, x, y)); }
/* Writes `first` plus the places of the bits, ascending; returns where the next go. */
static inline int32_t *w_places(int32_t *out, unsigned bits, int32_t first)
{
    for (; bits; bits &= bits - 1) *out++ = first + __builtin_ctz(bits);
    return out;
}

#define prefetch(p) __builtin_prefetch(p)
#define prefetch_far(p) __builtin_prefetch(p, 0, 2)

#endif
