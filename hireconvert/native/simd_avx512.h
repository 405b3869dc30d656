/* Sixteen floats at a time as one AVX-512 register. */
#ifndef HIRE_SIMD_H
#define HIRE_SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define HIRE_SPECIALISED 1
#define HIRE_UNROLL _Pragma("GCC unroll 16")

typedef __m512 v16;
typedef __m512i w16;

static inline v16 v_set1(float a) { return _mm512_set1_ps(a); }
static inline v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
/* Four floats, four times. */
static inline v16 v_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
static inline v16 v_add(v16 x, v16 y) { return _mm512_add_ps(x, y); }
static inline v16 v_sub(v16 x, v16 y) { return _mm512_sub_ps(x, y); }
static inline v16 v_mul(v16 x, v16 y) { return _mm512_mul_ps(x, y); }
static inline v16 v_div(v16 x, v16 y) { return _mm512_div_ps(x, y); }
static inline v16 v_max(v16 x, v16 y) { return _mm512_max_ps(x, y); }
static inline v16 v_min(v16 x, v16 y) { return _mm512_min_ps(x, y); }
static inline v16 v_fma(v16 x, v16 y, v16 z) { return _mm512_fmadd_ps(x, y, z); }
static inline v16 v_sqrt(v16 x) { return _mm512_sqrt_ps(x); }
static inline v16 v_abs(v16 x) { return _mm512_abs_ps(x); }
static inline v16 v_round(v16 x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 2^x for whole numbers in [-126, 127]. */
static inline v16 v_pow2(v16 x)
{
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
static inline float v_sum(v16 x) { return _mm512_reduce_add_ps(x); }
/* Of two vectors, in each quarter: lanes 0 + 2 of x and of y, then lanes 1 + 3. */
static inline v16 v_pairs(v16 x, v16 y)
{
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
}
/* Of two such vectors, in each quarter: sums of the quarters of four vectors. */
static inline v16 v_quarters(v16 x, v16 y)
{
    const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
/* The sums of the lower eight lanes of sixteen vectors, and of the upper ones. */
static inline void v_halves(const v16 *x, v16 *low, v16 *high)
{
    v16 four[4];
HIRE_UNROLL
    for (int i = 0; i < 4; i++)
        four[i] = v_quarters(v_pairs(x[4 * i], x[4 * i + 1]), v_pairs(x[4 * i + 2], x[4 * i + 3]));
    const v16 a = _mm512_shuffle_f32x4(four[0], four[1], 0x44);
    const v16 b = _mm512_shuffle_f32x4(four[2], four[3], 0x44);
    const v16 c = _mm512_shuffle_f32x4(four[0], four[1], 0xee);
    const v16 d = _mm512_shuffle_f32x4(four[2], four[3], 0xee);
    *low = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    *high = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}
static inline float v_most(v16 x) { return _mm512_reduce_max_ps(x); }
/* The largest of each four lanes, in all of them. */
static inline v16 v_most_of_four(v16 x)
{
    x = _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
    return _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
}
static inline int v_finite(v16 x)
{
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ) ==
           0xffff;
}
static inline v16 v_load_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline v16 v_load_bf16(const void *p)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline w16 w_load4(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline w16 w_load2(const uint8_t *p)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
static inline w16 w_load1(const uint8_t *p)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
/* The codes that start `shift` bits up in every lane, less the middle code. Up to 3 bits a permutation
 * of a table is the conversion: it looks at 4 bits of each lane only. */
static inline v16 v_code(w16 x, int shift, int bits)
{
    const __m512i moved = shift ? _mm512_srli_epi32(x, (unsigned)shift) : x;
    if (bits == 2)
        return _mm512_permutexvar_ps(
            moved, _mm512_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f,
                                  0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f));
    if (bits == 3)
        return _mm512_permutexvar_ps(
            moved, _mm512_setr_ps(-3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f, -3.5f, -2.5f,
                                  -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f));
    const __m512 code =
        _mm512_cvtepi32_ps(_mm512_and_epi32(moved, _mm512_set1_epi32((1 << bits) - 1)));
    return _mm512_sub_ps(code, _mm512_set1_ps((float)((1 << bits) - 1) / 2));
}
/* ------------------------------------------------------------------ whole numbers in 32-bit lanes */

static inline w16 w_set1(int32_t a) { return _mm512_set1_epi32(a); }
static inline w16 w_add(w16 x, w16 y) { return _mm512_add_epi32(x, y); }
static inline w16 w_and(w16 x, w16 y) { return _mm512_and_si512(x, y); }
static inline w16 w_or(w16 x, w16 y) { return _mm512_or_si512(x, y); }
static inline w16 w_xor(w16 x, w16 y) { return _mm512_xor_si512(x, y); }
static inline w16 w_left(w16 x, int shift) { return _mm512_slli_epi32(x, (unsigned)shift); }
static inline w16 w_right(w16 x, int shift) { return _mm512_srli_epi32(x, (unsigned)shift); }
static inline void w_store(void *p, w16 x) { _mm512_storeu_si512(p, x); }
static inline v16 v_from_w(w16 x) { return _mm512_cvtepi32_ps(x); }
/* To the nearest, ties to even; some number for what is no number. */
static inline w16 w_round(v16 x) { return _mm512_cvtps_epi32(x); }
/* Adds to every lane the products of its four bytes, up to 127 and not negative, with the four
 * signed ones at p. */
static inline w16 w_dot(w16 sum, w16 codes, const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}
/* The same where every lane has four signed bytes of its own, at p + 4 l. */
static inline w16 w_dot_each(w16 sum, w16 codes, const int8_t *p)
{
    return _mm512_dpbusd_epi32(sum, codes, _mm512_loadu_si512(p));
}
/* Adds to every lane the products of its four bytes, each less BYTE_TAKEN, with the four signed ones
 * at p. */
enum { BYTE_TAKEN = 0 };
static inline w16 w_dot_bytes(w16 sum, w16 bytes, const int8_t *p) { return w_dot(sum, bytes, p); }
/* Lane `place` of the table, which is less than 8. */
static inline v16 v_lookup(v16 table, w16 place) { return _mm512_permutexvar_ps(place, table); }
/* Of each four lanes the lowest bytes side by side, then the next bytes, to the highest. */
static inline w16 w_by_byte(w16 x)
{
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(order));
}
/* Byte 16 q + 4 r + i in lane 4 q + i. */
static inline w16 w_bytes(w16 x, const int r)
{
    const __m128i byte = _mm_add_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(4 * r));
    const __m128i order = _mm_or_si128(byte, _mm_set1_epi32((int)0xffffff00));
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(order));
}
/* Bytes 16 q + 4 r + i of the four rows side by side in lane 4 q + i of out[r]. */
static inline void w_interleave(const w16 *row, w16 *out)
{
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
}
/* Every byte of the codes, less than 16, as the table has it. */
static inline w16 w_table(const uint8_t *table, w16 codes)
{
    const __m128i sixteen = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), codes);
}
/* Counts, lane by lane, where x > y; both signed. */
static inline w16 w_count_above(w16 count, w16 x, w16 y)
{
    return _mm512_mask_add_epi32(count, _mm512_cmpgt_epi32_mask(x, y), count, _mm512_set1_epi32(1));
}
/* A bit for every lane where x > y (both signed), and where x = y. */
static inline unsigned w_above(w16 x, w16 y) { return _mm512_cmpgt_epi32_mask(x, y); }
static inline unsigned w_equal(w16 x, w16 y) { return _mm512_cmpeq_epi32_mask(x, y); }
/* Writes `first` plus the places of the bits, ascending; returns where the next go. */
static inline int32_t *w_places(int32_t *out, unsigned bits, int32_t first)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    const int num = __builtin_popcount(bits);
    /* Not compressed into memory: that takes some hundred cycles on AMD's Zen 4. */
    _mm512_mask_storeu_epi32(out, (__mmask16)((1u << num) - 1),
                             _mm512_maskz_compress_epi32((__mmask16)bits, place));
    return out + num;
}

/* A macro: GCC takes a function that only prefetches for one without effect and drops its calls. */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
/* For what much else is read before: the second cache has room for more misses. */
#define prefetch_far(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#endif
