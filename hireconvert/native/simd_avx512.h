/* Sixteen floats at a time as one AVX-512 register. */
#ifndef HIRE_SIMD_H
#define HIRE_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#define HIRE_SPECIALISED 1
#define HIRE_UNROLL _Pragma("GCC unroll 16")

typedef __m512 v16;
typedef __m512i w16;

static inline v16 v_set1(float a) { return _mm512_set1_ps(a); }
static inline v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
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
static inline v16 v_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
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
/* The codes that start `shift` bits up in every lane, less the middle code. Up to 4 bits a permutation of a table is the
 * conversion: it looks at 4 bits of each lane only. */
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
    if (bits == 4)
        return _mm512_permutexvar_ps(
            moved, _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f,
                                  1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f));
    const __m512 code =
        _mm512_cvtepi32_ps(_mm512_and_epi32(moved, _mm512_set1_epi32((1 << bits) - 1)));
    return _mm512_sub_ps(code, _mm512_set1_ps((float)((1 << bits) - 1) / 2));
}
/* A macro: GCC takes a function that only prefetches for one without effect and drops its calls. */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)

#endif
