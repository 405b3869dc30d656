/* Sixteen floats at a time as two AVX2 registers; FMA and F16C come with every CPU that has it. */
#ifndef HIRE_SIMD_H
#define HIRE_SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define HIRE_SPECIALISED 1
#define HIRE_UNROLL _Pragma("GCC unroll 16")

typedef struct {
    __m256 a, b;
} v16;
typedef struct {
    __m256i a, b;
} w16;

#define HIRE_BOTH(op, x, y) ((v16){op((x).a, (y).a), op((x).b, (y).b)})

static inline v16 v_set1(float a) { return (v16){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline v16 v_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void v_store(float *p, v16 x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
/* Four floats, four times. */
static inline v16 v_four(const float *p)
{
    const __m256 twice = _mm256_broadcast_ps((const __m128 *)p);
    return (v16){twice, twice};
}
static inline v16 v_add(v16 x, v16 y) { return HIRE_BOTH(_mm256_add_ps, x, y); }
static inline v16 v_sub(v16 x, v16 y) { return HIRE_BOTH(_mm256_sub_ps, x, y); }
static inline v16 v_mul(v16 x, v16 y) { return HIRE_BOTH(_mm256_mul_ps, x, y); }
static inline v16 v_div(v16 x, v16 y) { return HIRE_BOTH(_mm256_div_ps, x, y); }
static inline v16 v_max(v16 x, v16 y) { return HIRE_BOTH(_mm256_max_ps, x, y); }
static inline v16 v_min(v16 x, v16 y) { return HIRE_BOTH(_mm256_min_ps, x, y); }
static inline v16 v_fma(v16 x, v16 y, v16 z)
{
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline v16 v_sqrt(v16 x) { return (v16){_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline v16 v_abs(v16 x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline v16 v_round(v16 x)
{
    return (v16){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 v_pow2_half(__m256 x)
{
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
/* 2^x for whole numbers in [-126, 127]. */
static inline v16 v_pow2(v16 x) { return (v16){v_pow2_half(x.a), v_pow2_half(x.b)}; }
static inline float v_sum(v16 x)
{
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
/* Of two vectors, in each quarter: lanes 0 + 2 of x and of y, then lanes 1 + 3. */
static inline __m256 half_pairs(__m256 x, __m256 y)
{
    return _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
}
/* Of four vectors: the sums of their quarters side by side. */
static inline __m256 half_quarters(__m256 x, __m256 y, __m256 z, __m256 w)
{
    const __m256d a = _mm256_castps_pd(half_pairs(x, y)), b = _mm256_castps_pd(half_pairs(z, w));
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
}
/* Of eight vectors: the sums of both their quarters. */
static inline __m256 half_eight(__m256 x, __m256 y)
{
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
/* The sums of the lower eight lanes of sixteen vectors, and of the upper ones. */
static inline void v_halves(const v16 *x, v16 *low, v16 *high)
{
    __m256 a[4], b[4];
HIRE_UNROLL
    for (int i = 0; i < 4; i++) {
        const v16 *four = x + 4 * i;
        a[i] = half_quarters(four[0].a, four[1].a, four[2].a, four[3].a);
        b[i] = half_quarters(four[0].b, four[1].b, four[2].b, four[3].b);
    }
    *low = (v16){half_eight(a[0], a[1]), half_eight(a[2], a[3])};
    *high = (v16){half_eight(b[0], b[1]), half_eight(b[2], b[3])};
}
static inline float v_most(v16 x)
{
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
static inline __m256 half_most(__m256 x)
{
    x = _mm256_max_ps(x, _mm256_permute_ps(x, 0xb1));
    return _mm256_max_ps(x, _mm256_permute_ps(x, 0x4e));
}
/* The largest of each four lanes, in all of them. */
static inline v16 v_most_of_four(v16 x) { return (v16){half_most(x.a), half_most(x.b)}; }
static inline int v_finite(v16 x)
{
    const __m256 most = _mm256_set1_ps(__builtin_inff());
    const v16 size = v_abs(x);
    return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(size.a, most, _CMP_LT_OQ),
                                            _mm256_cmp_ps(size.b, most, _CMP_LT_OQ))) == 0xff;
}
static inline v16 v_load_f16(const void *p)
{
    const __m128i *halves = p;
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                 _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
static inline __m256 v_bf16_half(const __m128i *p)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline v16 v_load_bf16(const void *p)
{
    const __m128i *halves = p;
    return (v16){v_bf16_half(halves), v_bf16_half(halves + 1)};
}
static inline w16 w_load4(const uint8_t *p)
{
    return (w16){_mm256_loadu_si256((const __m256i *)p),
                 _mm256_loadu_si256((const __m256i *)(p + 32))};
}
static inline w16 w_load2(const uint8_t *p)
{
    return (w16){_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
static inline w16 w_load1(const uint8_t *p)
{
    return (w16){_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                 _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
/* The codes that start `shift` bits up in every lane, less the middle code. Up to 3 bits a permutation of a table is the
 * conversion: it looks at 3 bits of each lane only. */
static inline __m256 v_code_half(__m256i x, int shift, int bits)
{
    const __m256i moved = shift ? _mm256_srli_epi32(x, shift) : x;
    if (bits == 2)
        return _mm256_permutevar8x32_ps(
            _mm256_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f), moved);
    if (bits == 3)
        return _mm256_permutevar8x32_ps(
            _mm256_setr_ps(-3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f), moved);
    const __m256 code =
        _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32((1 << bits) - 1)));
    return _mm256_sub_ps(code, _mm256_set1_ps((float)((1 << bits) - 1) / 2));
}
static inline v16 v_code(w16 x, int shift, int bits)
{
    return (v16){v_code_half(x.a, shift, bits), v_code_half(x.b, shift, bits)};
}
/* ------------------------------------------------------------------ whole numbers in 32-bit lanes */

#define HIRE_WHOLE(op, x, y) ((w16){op((x).a, (y).a), op((x).b, (y).b)})

static inline w16 w_set1(int32_t a) { return (w16){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
static inline w16 w_add(w16 x, w16 y) { return HIRE_WHOLE(_mm256_add_epi32, x, y); }
static inline w16 w_and(w16 x, w16 y) { return HIRE_WHOLE(_mm256_and_si256, x, y); }
static inline w16 w_or(w16 x, w16 y) { return HIRE_WHOLE(_mm256_or_si256, x, y); }
static inline w16 w_xor(w16 x, w16 y) { return HIRE_WHOLE(_mm256_xor_si256, x, y); }
static inline w16 w_left(w16 x, int shift)
{
    return (w16){_mm256_slli_epi32(x.a, shift), _mm256_slli_epi32(x.b, shift)};
}
static inline w16 w_right(w16 x, int shift)
{
    return (w16){_mm256_srli_epi32(x.a, shift), _mm256_srli_epi32(x.b, shift)};
}
static inline void w_store(void *p, w16 x)
{
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
static inline v16 v_from_w(w16 x) { return (v16){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
/* To the nearest, ties to even; some number for what is no number. */
static inline w16 w_round(v16 x) { return (w16){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
/* Adds to every lane the products of its four bytes, up to 127 and not negative, with the four
 * signed ones at p. */
static inline w16 w_dot(w16 sum, w16 codes, const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m256i signed4 = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
    const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, signed4), one);
    const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, signed4), one);
    return (w16){_mm256_add_epi32(sum.a, a), _mm256_add_epi32(sum.b, b)};
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
    const __m256i one = _mm256_set1_epi16(1);
    const __m256i x = _mm256_loadu_si256((const __m256i *)p);
    const __m256i y = _mm256_loadu_si256((const __m256i *)(p + 32));
    const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, x), one);
    const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, y), one);
    return (w16){_mm256_add_epi32(sum.a, a), _mm256_add_epi32(sum.b, b)};
}
/* Lane `place` of the table, which is less than 8. */
static inline v16 v_lookup(v16 table, w16 place)
{
    return (v16){_mm256_permutevar8x32_ps(table.a, place.a),
                 _mm256_permutevar8x32_ps(table.a, place.b)};
}
/* Of each four lanes the lowest bytes side by side, then the next bytes, to the highest. */
static inline w16 w_by_byte(w16 x)
{
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (w16){_mm256_shuffle_epi8(x.a, order), _mm256_shuffle_epi8(x.b, order)};
}
/* Byte 16 q + 4 r + i in lane 4 q + i. */
static inline w16 w_bytes(w16 x, const int r)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
    const __m256i byte = _mm256_add_epi32(lane, _mm256_set1_epi32(4 * r));
    const __m256i order = _mm256_or_si256(byte, _mm256_set1_epi32((int)0xffffff00));
    return (w16){_mm256_shuffle_epi8(x.a, order), _mm256_shuffle_epi8(x.b, order)};
}
/* Bytes 16 q + 4 r + i of the four rows side by side in lane 4 q + i of out[r]. */
static inline void w_interleave(const w16 *row, w16 *out)
{
    const w16 a = HIRE_WHOLE(_mm256_unpacklo_epi8, row[0], row[1]);
    const w16 b = HIRE_WHOLE(_mm256_unpackhi_epi8, row[0], row[1]);
    const w16 c = HIRE_WHOLE(_mm256_unpacklo_epi8, row[2], row[3]);
    const w16 d = HIRE_WHOLE(_mm256_unpackhi_epi8, row[2], row[3]);
    out[0] = HIRE_WHOLE(_mm256_unpacklo_epi16, a, c);
    out[1] = HIRE_WHOLE(_mm256_unpackhi_epi16, a, c);
    out[2] = HIRE_WHOLE(_mm256_unpacklo_epi16, b, d);
    out[3] = HIRE_WHOLE(_mm256_unpackhi_epi16, b, d);
}
/* Every byte of the codes, less than 16, as the table has it. */
static inline w16 w_table(const uint8_t *table, w16 codes)
{
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (w16){_mm256_shuffle_epi8(both, codes.a), _mm256_shuffle_epi8(both, codes.b)};
}
/* Counts, lane by lane, where x > y; both signed. */
static inline w16 w_count_above(w16 count, w16 x, w16 y)
{
    return (w16){_mm256_sub_epi32(count.a, _mm256_cmpgt_epi32(x.a, y.a)),
                 _mm256_sub_epi32(count.b, _mm256_cmpgt_epi32(x.b, y.b))};
}
static inline unsigned w_bits(__m256i a, __m256i b)
{
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(a)) |
           (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8;
}
/* A bit for every lane where x > y (both signed), and where x = y. */
static inline unsigned w_above(w16 x, w16 y)
{
    return w_bits(_mm256_cmpgt_epi32(x.a, y.a), _mm256_cmpgt_epi32(x.b, y.b));
}
static inline unsigned w_equal(w16 x, w16 y)
{
    return w_bits(_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b));
}
/* Writes `first` plus the places of the bits, ascending; returns where the next go. */
static inline int32_t *w_places(int32_t *out, unsigned bits, int32_t first)
{
    for (; bits; bits &= bits - 1) *out++ = first + __builtin_ctz(bits);
    return out;
}

/* A macro: GCC takes a function that only prefetches for one without effect and drops its calls. */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#define prefetch_far(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#endif
