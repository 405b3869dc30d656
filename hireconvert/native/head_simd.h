/* What the head needs beside simd_*.h: integer products of bytes, sixteen doubles, largest lanes.
 * A w16 holds 64 unsigned codes (times) 64 signed bytes; each of its 16 lanes sums four products. */
#ifndef HIRE_HEAD_SIMD_H
#define HIRE_HEAD_SIMD_H

/* HIRE_HEAD_LEVEL: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI. */
#if HIRE_HEAD_LEVEL >= 2

typedef struct {
    __m512d a, b;
} d16;

static inline w16 h_zero(void) { return _mm512_setzero_si512(); }
static inline w16 h_word(int32_t word) { return _mm512_set1_epi32(word); }
static inline w16 h_load_half(const void *p)
{
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p));
}
static inline w16 h_add(w16 x, w16 y) { return _mm512_add_epi32(x, y); }
static inline w16 h_low(w16 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline w16 h_high(w16 x) { return h_low(_mm512_srli_epi16(x, 4)); }
#if HIRE_HEAD_LEVEL == 3
static inline w16 h_dot_nibbles(w16 sum, w16 codes, w16 x)
{
    return _mm512_dpbusd_epi32(sum, codes, x);
}
static inline w16 h_dot(w16 sum, w16 codes, w16 x) { return _mm512_dpbusd_epi32(sum, codes, x); }
#else
static inline w16 h_dot_nibbles(w16 sum, w16 codes, w16 x)
{
    const __m512i pairs = _mm512_maddubs_epi16(codes, x); /* at most 2 * 15 * 128 */
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
static inline w16 h_dot(w16 sum, w16 codes, w16 x)
{
    const w16 high = h_dot_nibbles(h_zero(), h_high(codes), x);
    return _mm512_add_epi32(h_dot_nibbles(sum, h_low(codes), x), _mm512_slli_epi32(high, 4));
}
#endif
static inline v16 h_float(w16 x) { return _mm512_cvtepi32_ps(x); }
static inline int64_t h_sum(w16 x) { return _mm512_reduce_add_epi32(x); }
static inline float h_max(v16 x) { return _mm512_reduce_max_ps(x); }
static inline d16 d_load(const double *p)
{
    return (d16){_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)};
}
static inline void d_store(double *p, d16 x)
{
    _mm512_storeu_pd(p, x.a);
    _mm512_storeu_pd(p + 8, x.b);
}
static inline d16 d_add(d16 x, d16 y)
{
    return (d16){_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)};
}
static inline __m512d d_product(__m256 x, __m256 y)
{
    return _mm512_mul_pd(_mm512_cvtps_pd(x), _mm512_cvtps_pd(y));
}
static inline d16 d_times(v16 x, v16 y)
{
    return (d16){d_product(_mm512_castps512_ps256(x), _mm512_castps512_ps256(y)),
                 d_product(_mm512_extractf32x8_ps(x, 1), _mm512_extractf32x8_ps(y, 1))};
}

#elif HIRE_HEAD_LEVEL == 1

typedef struct {
    __m256d q[4];
} d16;

static inline w16 h_zero(void) { return (w16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline w16 h_word(int32_t word)
{
    return (w16){_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
static inline w16 h_load_half(const void *p)
{
    return (w16){_mm256_loadu_si256((const __m256i *)p), _mm256_setzero_si256()};
}
static inline w16 h_add(w16 x, w16 y)
{
    return (w16){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
static inline w16 h_low(w16 x)
{
    const __m256i mask = _mm256_set1_epi8(15);
    return (w16){_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
static inline w16 h_high(w16 x)
{
    return h_low((w16){_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
static inline __m256i h_dot_half(__m256i sum, __m256i codes, __m256i x)
{
    const __m256i pairs = _mm256_maddubs_epi16(codes, x); /* at most 2 * 15 * 128 */
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline w16 h_dot_nibbles(w16 sum, w16 codes, w16 x)
{
    return (w16){h_dot_half(sum.a, codes.a, x.a), h_dot_half(sum.b, codes.b, x.b)};
}
static inline w16 h_dot(w16 sum, w16 codes, w16 x)
{
    const w16 high = h_dot_nibbles(h_zero(), h_high(codes), x);
    const w16 low = h_dot_nibbles(sum, h_low(codes), x);
    return (w16){_mm256_add_epi32(low.a, _mm256_slli_epi32(high.a, 4)),
                 _mm256_add_epi32(low.b, _mm256_slli_epi32(high.b, 4))};
}
static inline v16 h_float(w16 x)
{
    return (v16){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
static inline int64_t h_sum(w16 x)
{
    int32_t lane[8];
    int64_t sum = 0;
    _mm256_storeu_si256((__m256i *)lane, _mm256_add_epi32(x.a, x.b));
    for (int l = 0; l < 8; l++) sum += lane[l];
    return sum;
}
static inline float h_max(v16 x)
{
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
static inline d16 d_load(const double *p)
{
    return (d16){{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
                  _mm256_loadu_pd(p + 12)}};
}
static inline void d_store(double *p, d16 x)
{
    for (int i = 0; i < 4; i++) _mm256_storeu_pd(p + 4 * i, x.q[i]);
}
static inline d16 d_add(d16 x, d16 y)
{
    for (int i = 0; i < 4; i++) x.q[i] = _mm256_add_pd(x.q[i], y.q[i]);
    return x;
}
static inline __m256d d_product(__m128 x, __m128 y)
{
    return _mm256_mul_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
}
static inline d16 d_times(v16 x, v16 y)
{
    return (d16){{d_product(_mm256_castps256_ps128(x.a), _mm256_castps256_ps128(y.a)),
                  d_product(_mm256_extractf128_ps(x.a, 1), _mm256_extractf128_ps(y.a, 1)),
                  d_product(_mm256_castps256_ps128(x.b), _mm256_castps256_ps128(y.b)),
                  d_product(_mm256_extractf128_ps(x.b, 1), _mm256_extractf128_ps(y.b, 1))}};
}

#else

typedef struct {
    double l[16];
} d16;

static inline w16 h_zero(void) { w16 r; HIRE_LOOP r.l[l] = 0; return r; }
static inline w16 h_word(int32_t word) { w16 r; HIRE_LOOP r.l[l] = (uint32_t)word; return r; }
static inline w16 h_load_half(const void *p) { w16 r = h_zero(); memcpy(&r, p, 32); return r; }
static inline w16 h_add(w16 a, w16 b) { HIRE_LOOP a.l[l] += b.l[l]; return a; }
static inline w16 h_low(w16 a) { HIRE_LOOP a.l[l] &= 0x0f0f0f0f; return a; }
static inline w16 h_high(w16 a) { HIRE_LOOP a.l[l] = a.l[l] >> 4 & 0x0f0f0f0f; return a; }
static inline w16 h_dot(w16 sum, w16 codes, w16 x)
{
    uint8_t code[64];
    int8_t input[64];
    memcpy(code, &codes, sizeof code);
    memcpy(input, &x, sizeof input);
    for (int l = 0; l < 16; l++) {
        int32_t four = 0;
        for (int b = 4 * l; b < 4 * l + 4; b++) four += code[b] * input[b];
        sum.l[l] += (uint32_t)four;
    }
    return sum;
}
static inline w16 h_dot_nibbles(w16 sum, w16 codes, w16 x) { return h_dot(sum, codes, x); }
static inline v16 h_float(w16 a)
{
    int32_t lane[16];
    v16 r;
    memcpy(lane, &a, sizeof lane);
    HIRE_LOOP r.l[l] = (float)lane[l];
    return r;
}
static inline int64_t h_sum(w16 a)
{
    int32_t lane[16];
    int64_t sum = 0;
    memcpy(lane, &a, sizeof lane);
    HIRE_LOOP sum += lane[l];
    return sum;
}
static inline float h_max(v16 a)
{
    float most = a.l[0];
    HIRE_LOOP if (a.l[l] > most) most = a.l[l];
    return most;
}
static inline d16 d_load(const double *p) { d16 r; memcpy(&r, p, sizeof r); return r; }
static inline void d_store(double *p, d16 x) { memcpy(p, &x, sizeof x); }
static inline d16 d_add(d16 a, d16 b) { HIRE_LOOP a.l[l] += b.l[l]; return a; }
static inline d16 d_times(v16 a, v16 b)
{
    d16 r;
    HIRE_LOOP r.l[l] = (double)a.l[l] * b.l[l];
    return r;
}

#endif
#endif
