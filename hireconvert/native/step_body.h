/* What a decode step needs beside its FFN, written once over the vectors of simd_*.h, after
 * kernels_body.h. What a function adds up, and in which order, depends on the layer alone. */

/* ------------------------------------------------------------------ matrices */

/* The last elements of a row, and zeros behind them. */
INLINE void load_tail(const void *row, int64_t from, int64_t to, const int type, v16 *a, v16 *b)
{
    unsigned char tail[128] = {0};
    const int64_t size = type_size(type);
    memcpy(tail, (const char *)row + from * size, (size_t)((to - from) * size));
    *a = load_as(tail, 0, type);
    *b = load_as(tail, 16, type);
}

/* Some rows times some x; even and odd vectors of a row are summed apart, so that no sum waits. */
INLINE void some_rows(const hire_matrix *m, int64_t at, const float *x, int64_t x_stride, float *y,
                      int64_t y_stride, const int rows, const int columns, const int type)
{
    const int64_t bytes = m->stride * type_size(type), whole = m->inputs / 32 * 32;
    const char *row = (const char *)m->rows + at * bytes;
    const char *next = at + 2 * rows <= m->outputs ? row + rows * bytes : row;
    v16 even[16], odd[16];
HIRE_UNROLL
    for (int i = 0; i < rows * columns; i++) even[i] = odd[i] = v_set1(0.0f);
    for (int64_t j = 0; j < whole; j += 32) {
HIRE_UNROLL
        for (int r = 0; r < rows; r++) {
            const v16 w0 = load_as(row + r * bytes, j, type);
            const v16 w1 = load_as(row + r * bytes, j + 16, type);
            prefetch(next + r * bytes + j * type_size(type));
            if (type == HIRE_FLOAT32) prefetch(next + r * bytes + j * 4 + 64);
HIRE_UNROLL
            for (int c = 0; c < columns; c++) {
                const int i = r * columns + c;
                even[i] = v_fma(w0, v_load(x + c * x_stride + j), even[i]);
                odd[i] = v_fma(w1, v_load(x + c * x_stride + j + 16), odd[i]);
            }
        }
    }
    if (whole < m->inputs) {
        for (int r = 0; r < rows; r++) {
            v16 w0, w1;
            load_tail(row + r * bytes, whole, m->inputs, type, &w0, &w1);
            for (int c = 0; c < columns; c++) {
                const int i = r * columns + c;
                even[i] = v_fma(w0, v_load(x + c * x_stride + whole), even[i]);
                odd[i] = v_fma(w1, v_load(x + c * x_stride + whole + 16), odd[i]);
            }
        }
    }
    for (int i = 0; i < rows * columns; i++) {
        const int64_t r = at + i / columns;
        const float sum = v_sum(v_add(even[i], odd[i]));
        y[i % columns * y_stride + r] = sum + (m->bias != NULL ? m->bias[r] : 0.0f);
    }
}

/* Up to four x at once, whose sums find room in the registers. */
INLINE void few_columns(const hire_matrix *m, const float *x, int64_t x_stride, int64_t num_x,
                        int64_t from, int64_t to, float *y, int64_t y_stride, const int type)
{
    int64_t at = from;
    switch (num_x) {
    case 1:
        for (; at < to; at++) some_rows(m, at, x, x_stride, y, y_stride, 1, 1, type);
        break;
    case 2:
        for (; at + 4 <= to; at += 4) some_rows(m, at, x, x_stride, y, y_stride, 4, 2, type);
        for (; at < to; at++) some_rows(m, at, x, x_stride, y, y_stride, 1, 2, type);
        break;
    case 3:
        for (; at + 2 <= to; at += 2) some_rows(m, at, x, x_stride, y, y_stride, 2, 3, type);
        for (; at < to; at++) some_rows(m, at, x, x_stride, y, y_stride, 1, 3, type);
        break;
    default:
        for (; at + 2 <= to; at += 2) some_rows(m, at, x, x_stride, y, y_stride, 2, 4, type);
        for (; at < to; at++) some_rows(m, at, x, x_stride, y, y_stride, 1, 4, type);
        break;
    }
}

/* [from, to) are few rows, which stay in the cache for the next four x. */
INLINE void matrix_as(const hire_matrix *m, const hire_inputs *in, int64_t from, int64_t to,
                      float *y, int64_t y_stride, const int type)
{
    for (int64_t c = 0; c < in->num_rows; c += 4)
        few_columns(m, in->x + c * in->stride, in->stride,
                    in->num_rows - c < 4 ? in->num_rows - c : 4, from, to, y + c * y_stride,
                    y_stride, type);
}

static NOINLINE void matrix_f32(const hire_matrix *m, const hire_inputs *in, int64_t from,
                                int64_t to, float *y, int64_t y_stride)
{
    matrix_as(m, in, from, to, y, y_stride, HIRE_FLOAT32);
}

static NOINLINE void matrix_bf16(const hire_matrix *m, const hire_inputs *in, int64_t from,
                                 int64_t to, float *y, int64_t y_stride)
{
    matrix_as(m, in, from, to, y, y_stride, HIRE_BFLOAT16);
}

static NOINLINE void matrix_f16(const hire_matrix *m, const hire_inputs *in, int64_t from,
                                int64_t to, float *y, int64_t y_stride)
{
    matrix_as(m, in, from, to, y, y_stride, HIRE_FLOAT16);
}

/* ------------------------------------------------------------------ matrices of codes */

static void split_rows(const hire_matrix *m, const hire_inputs *in)
{
    const int64_t blocks = hire_matrix_blocks(m), most = in->stride / 32;
    for (int64_t i = 0; i < in->num_rows; i++)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t begin = b * m->block, left = m->inputs - begin;
            const int64_t num = left < m->block ? left : m->block;
            split_block(in->x + i * in->stride + begin, (num + 31) / 32 * 32,
                        in->digits + 4 * (i * in->stride + begin), in->scale + i * most + b,
                        in->sum + 4 * (i * most + b));
        }
}

/* The sums over a block of codes times each digit, for up to four x, begin where the codes' zero adds
 * nothing. */
INLINE void begin_sums(const hire_inputs *in, int64_t at, int64_t block, int32_t zero,
                       w16 (*sum)[DIGITS], const int columns)
{
    const int64_t most = in->stride / 32;
HIRE_UNROLL
    for (int c = 0; c < columns; c++)
HIRE_UNROLL
        for (int d = 0; d < DIGITS; d++)
            sum[c][d] = w_set1(-zero * in->sum[4 * ((at + c) * most + block) + d]);
}

INLINE void add_sums(const hire_inputs *in, int64_t at, int64_t block, v16 unit, w16 (*sum)[DIGITS],
                     v16 *total, const int columns)
{
    const int64_t most = in->stride / 32;
HIRE_UNROLL
    for (int c = 0; c < columns; c++) {
        const v16 own = v_set1(in->scale[(at + c) * most + block]);
        total[c] = v_fma(v_mul(from_digits(sum[c], 0), own), unit, total[c]);
    }
}

/* A tile of outputs for up to four x. */
INLINE void tile_of_codes(const hire_matrix *m, const hire_inputs *in, int64_t tile, int64_t at,
                          v16 *total, const int columns)
{
    const int64_t blocks = hire_matrix_blocks(m);
    const int64_t tile_bytes = 64 * hire_matrix_words(m->inputs, m->block, 4);
    const uint8_t *p = (const uint8_t *)m->rows + tile * tile_bytes;
    const float *scale = m->scale + 16 * tile * blocks;
HIRE_UNROLL
    for (int c = 0; c < columns; c++) total[c] = v_set1(0.0f);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * m->block, left = m->inputs - begin;
        const int64_t words = ((left < m->block ? left : m->block) + 3) / 4;
        const int8_t *digits = in->digits + 4 * (at * in->stride + begin);
        w16 sum[4][DIGITS];
        begin_sums(in, at, b, HIRE_ZERO_CODE - BYTE_TAKEN, sum, columns);
        for (int64_t i = 0; i < words; i++, p += 64) {
            const w16 word = w_load4(p);
            prefetch(p + PREFETCH);
HIRE_UNROLL
            for (int c = 0; c < columns; c++)
HIRE_UNROLL
                for (int d = 0; d < DIGITS; d++)
                    sum[c][d] = w_dot_bytes(sum[c][d], word,
                                            digits + 4 * c * in->stride + 16 * i + 4 * d);
        }
        add_sums(in, at, b, v_load(scale + 16 * b), sum, total, columns);
    }
}

/* The same of codes of 4 bits. */
INLINE void tile_of_short_codes(const hire_matrix *m, const hire_inputs *in, int64_t tile,
                                int64_t at, v16 *total, const int columns)
{
    const int64_t blocks = hire_matrix_blocks(m);
    const uint8_t *p = (const uint8_t *)m->rows + tile * hire_int4_tile(m->inputs, m->block);
    const uint8_t *scales = p;
HIRE_UNROLL
    for (int c = 0; c < columns; c++) total[c] = v_set1(0.0f);
    for (int64_t b = 0; b < blocks; b++) {
        if (b % 2 == 0) {
            scales = p;
            prefetch(p + PREFETCH);
            p += HIRE_LINE;
        }
        const int64_t begin = b * m->block, left = m->inputs - begin;
        const int64_t words = ((left < m->block ? left : m->block) + 7) / 8;
        const int8_t *digits = in->digits + 4 * (at * in->stride + begin);
        w16 sum[4][DIGITS];
        begin_sums(in, at, b, HIRE_LEVEL_BIAS, sum, columns);
        for (int64_t i = 0; i < words; i++, p += 64) {
            const w16 word = w_load4(p);
            prefetch(p + PREFETCH);
HIRE_UNROLL
            for (int quad = 0; quad < 2; quad++) {
                const w16 code = quad_codes(&word, quad, 4, 1);
HIRE_UNROLL
                for (int c = 0; c < columns; c++)
HIRE_UNROLL
                    for (int d = 0; d < DIGITS; d++)
                        sum[c][d] = w_dot(sum[c][d], code, digits + 4 * c * in->stride + 32 * i +
                                                               16 * quad + 4 * d);
            }
        }
        add_sums(in, at, b, v_load_bf16((const uint16_t *)scales + 16 * (b % 2)), sum, total,
                 columns);
    }
}

INLINE void some_tile(const hire_matrix *m, const hire_inputs *in, int64_t tile, int64_t at,
                      v16 *total, const int columns, const int bits)
{
    if (bits == 4)
        tile_of_short_codes(m, in, tile, at, total, columns);
    else
        tile_of_codes(m, in, tile, at, total, columns);
}

INLINE void matrix_of_codes(const hire_matrix *m, const hire_inputs *in, int64_t from, int64_t to,
                            float *y, int64_t y_stride, const int bits)
{
    for (int64_t at = 0; at < in->num_rows; at += 4)
        for (int64_t tile = from / 16; 16 * tile < to; tile++) {
            const int columns = in->num_rows - at < 4 ? (int)(in->num_rows - at) : 4;
            v16 total[4];
            float out[16];
            switch (columns) {
            case 1: some_tile(m, in, tile, at, total, 1, bits); break;
            case 2: some_tile(m, in, tile, at, total, 2, bits); break;
            case 3: some_tile(m, in, tile, at, total, 3, bits); break;
            default: some_tile(m, in, tile, at, total, 4, bits); break;
            }
            const int64_t start = 16 * tile > from ? 16 * tile : from;
            const int64_t end = 16 * tile + 16 < to ? 16 * tile + 16 : to;
            for (int c = 0; c < columns; c++) {
                v_store(out, total[c]);
                for (int64_t r = start; r < end; r++)
                    y[(at + c) * y_stride + r] =
                        out[r - 16 * tile] + (m->bias != NULL ? m->bias[r] : 0.0f);
            }
        }
}

static NOINLINE void matrix_i8(const hire_matrix *m, const hire_inputs *in, int64_t from,
                               int64_t to, float *y, int64_t y_stride)
{
    matrix_of_codes(m, in, from, to, y, y_stride, 8);
}

static NOINLINE void matrix_i4(const hire_matrix *m, const hire_inputs *in, int64_t from,
                               int64_t to, float *y, int64_t y_stride)
{
    matrix_of_codes(m, in, from, to, y, y_stride, 4);
}

static void matrix(const hire_matrix *m, const hire_inputs *in, int64_t from, int64_t to, float *y,
                   int64_t y_stride)
{
    switch (m->type) {
    case HIRE_FLOAT32: matrix_f32(m, in, from, to, y, y_stride); break;
    case HIRE_BFLOAT16: matrix_bf16(m, in, from, to, y, y_stride); break;
    case HIRE_FLOAT16: matrix_f16(m, in, from, to, y, y_stride); break;
    case HIRE_INT8: matrix_i8(m, in, from, to, y, y_stride); break;
    default: matrix_i4(m, in, from, to, y, y_stride); break;
    }
}

/* ------------------------------------------------------------------ vectors */

static void norm(const float *x, const float *weight, double eps, int64_t num, float *out)
{
    v16 even = v_set1(0.0f), odd = even;
    int64_t j = 0;
    for (; j + 32 <= num; j += 32) {
        const v16 a = v_load(x + j), b = v_load(x + j + 16);
        even = v_fma(a, a, even);
        odd = v_fma(b, b, odd);
    }
    double sum = v_sum(v_add(even, odd));
    for (; j < num; j++) sum += x[j] * x[j];
    const float factor = (float)(1.0 / sqrt(sum / (double)num + eps));
    for (j = 0; j + 16 <= num; j += 16)
        v_store(out + j, v_mul(v_mul(v_load(x + j), v_set1(factor)), v_load(weight + j)));
    for (; j < num; j++) out[j] = x[j] * factor * weight[j];
}

static void rotate(float *x, const float *cosine, const float *sine, int64_t rotary)
{
    const int64_t half = rotary / 2;
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cosine[j] - b * sine[j];
        x[j + half] = b * cosine[j + half] + a * sine[j + half];
    }
}

static void store_at(void *to, int64_t place, const float *from, int64_t num, int type)
{
    store_as((char *)to + place * type_size(type), from, num, type);
}

static int all_finite(const float *x, int64_t num)
{
    int finite = 1;
    int64_t j = 0;
    for (; j + 16 <= num; j += 16) finite &= v_finite(v_load(x + j));
    for (; j < num; j++) finite &= x[j] - x[j] == 0.0f;
    return finite;
}

static void activate_all(int activation, float *gate, float *up, int64_t num)
{
    for (int64_t j = 0; j < num; j += 16) {
        float *to = gate != NULL ? gate + j : up + j;
        const int64_t left = num - j < 16 ? num - j : 16;
        float h[16] = {0}, other[16] = {0};
        memcpy(h, to, (size_t)left * sizeof *h);
        if (gate != NULL) memcpy(other, up + j, (size_t)left * sizeof *other);
        v16 value = activate(v_load(h), activation);
        if (gate != NULL) value = v_mul(value, v_load(other));
        v_store(h, value);
        memcpy(to, h, (size_t)left * sizeof *h);
    }
}

/* ------------------------------------------------------------------ attention */

/* Of `heads` queries that share keys and values: each number is the same whatever `heads` is. */

/* Scores of positions [at, at + num), not yet scaled. */
INLINE void some_scores(const float *q, int64_t q_stride, const char *keys, int64_t head_dim,
                        int64_t at, float *score, int64_t score_stride, const int heads,
                        const int num, const int type)
{
    const int64_t bytes = head_dim * type_size(type);
    const char *row = keys + at * bytes;
    v16 sum[8];
HIRE_UNROLL
    for (int i = 0; i < heads * num; i++) sum[i] = v_set1(0.0f);
    for (int64_t j = 0; j < head_dim; j += 16) {
HIRE_UNROLL
        for (int p = 0; p < num; p++) {
            const v16 key = load_as(row + p * bytes, j, type);
HIRE_UNROLL
            for (int h = 0; h < heads; h++)
                sum[p * heads + h] = v_fma(key, v_load(q + h * q_stride + j), sum[p * heads + h]);
        }
    }
HIRE_UNROLL
    for (int p = 0; p < num; p++)
HIRE_UNROLL
        for (int h = 0; h < heads; h++) score[h * score_stride + p] = v_sum(sum[p * heads + h]);
}

/* out = weights times values, `vectors` of sixteen numbers from number `start` of the head on;
 * even and odd positions are summed apart, so that no sum waits. */
INLINE void value_sums(const float *weight, int64_t weight_stride, const char *values,
                       int64_t head_dim, int64_t start, int64_t from, int64_t to, float *out,
                       int64_t out_stride, const int heads, const int vectors, const int type)
{
    const int64_t bytes = head_dim * type_size(type);
    v16 even[8], odd[8];
HIRE_UNROLL
    for (int i = 0; i < heads * vectors; i++) even[i] = odd[i] = v_set1(0.0f);
    for (int64_t at = from; at < to; at += 2) {
        const char *row = values + at * bytes;
        const int both = at + 1 < to;
HIRE_UNROLL
        for (int v = 0; v < vectors; v++) {
            const v16 a = load_as(row, start + 16 * v, type);
HIRE_UNROLL
            for (int h = 0; h < heads; h++) {
                const v16 w = v_set1(weight[h * weight_stride + at - from]);
                even[h * vectors + v] = v_fma(a, w, even[h * vectors + v]);
            }
        }
        if (!both) break;
HIRE_UNROLL
        for (int v = 0; v < vectors; v++) {
            const v16 b = load_as(row + bytes, start + 16 * v, type);
HIRE_UNROLL
            for (int h = 0; h < heads; h++) {
                const v16 w = v_set1(weight[h * weight_stride + at + 1 - from]);
                odd[h * vectors + v] = v_fma(b, w, odd[h * vectors + v]);
            }
        }
    }
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < vectors; v++)
            v_store(out + h * out_stride + start + 16 * v,
                    v_add(even[h * vectors + v], odd[h * vectors + v]));
}

/* score becomes exp(score - the largest); returns one over their sum. */
INLINE float softmax(float *score, int64_t num, float scaling, float softcap)
{
    v16 most = v_set1(-INFINITY);
    for (int64_t j = num; j < (num + 15) / 16 * 16; j++) score[j] = score[0];
    for (int64_t j = 0; j < num; j += 16) {
        v16 x = v_mul(v_load(score + j), v_set1(scaling));
        if (softcap > 0.0f) { /* tanh a = 2 sigmoid(2 a) - 1 */
            const v16 one = v_set1(1.0f), twice = v_mul(x, v_set1(2.0f / softcap));
            x = v_sub(v_mul(v_set1(2.0f), times_sigmoid(one, twice)), one);
            x = v_mul(x, v_set1(softcap));
        }
        v_store(score + j, x);
        most = v_max(most, x);
    }
    float lanes[16], top = -INFINITY;
    v_store(lanes, most);
    for (int l = 0; l < 16; l++) top = lanes[l] > top ? lanes[l] : top;
    v16 sum = v_set1(0.0f);
    for (int64_t j = 0; j < num; j += 16) {
        const v16 weight = v_exp(v_sub(v_load(score + j), v_set1(top)));
        v_store(score + j, weight);
        if (j + 16 <= num) sum = v_add(sum, weight);
    }
    float total = v_sum(sum);
    for (int64_t j = num / 16 * 16; j < num; j++) total += score[j];
    return 1.0f / total;
}

INLINE void attend_as(const hire_block *block, const float *q, int64_t stride, const char *keys,
                      const char *values, int64_t from, int64_t to, float *score,
                      int64_t score_stride, float *out, const int heads, const int type)
{
    const int64_t size = block->head_dim;
    const int num = heads > 2 ? 2 : 4, vectors = heads > 2 ? 2 : 4;
    int64_t at = from;
    for (; at + num <= to; at += num)
        some_scores(q, stride, keys, size, at, score + at - from, score_stride, heads, num, type);
    for (; at < to; at++)
        some_scores(q, stride, keys, size, at, score + at - from, score_stride, heads, 1, type);
    float factor[4];
    for (int h = 0; h < heads; h++)
        factor[h] = softmax(score + h * score_stride, to - from, (float)block->scaling,
                            (float)block->softcap);
    for (at = 0; at + 16 * vectors <= size; at += 16 * vectors)
        value_sums(score, score_stride, values, size, at, from, to, out, stride, heads, vectors,
                   type);
    for (; at < size; at += 16)
        value_sums(score, score_stride, values, size, at, from, to, out, stride, heads, 1, type);
    for (int h = 0; h < heads; h++)
        for (at = 0; at < size; at++) out[h * stride + at] *= factor[h];
}

INLINE void attend_heads(const hire_block *block, int64_t heads, const float *q, int64_t stride,
                         const char *keys, const char *values, int64_t from, int64_t to,
                         float *score, int64_t score_stride, float *out, const int type)
{
    switch (heads) {
    case 1:
        attend_as(block, q, stride, keys, values, from, to, score, score_stride, out, 1, type);
        break;
    case 2:
        attend_as(block, q, stride, keys, values, from, to, score, score_stride, out, 2, type);
        break;
    case 3:
        attend_as(block, q, stride, keys, values, from, to, score, score_stride, out, 3, type);
        break;
    default:
        attend_as(block, q, stride, keys, values, from, to, score, score_stride, out, 4, type);
        break;
    }
}

static void attend(const hire_block *block, int64_t heads, const float *q, int64_t stride,
                   const char *keys, const char *values, int64_t from, int64_t to, float *score,
                   int64_t score_stride, float *out)
{
    switch (block->cache_type) {
    case HIRE_FLOAT32:
        attend_heads(block, heads, q, stride, keys, values, from, to, score, score_stride, out,
                     HIRE_FLOAT32);
        break;
    case HIRE_BFLOAT16:
        attend_heads(block, heads, q, stride, keys, values, from, to, score, score_stride, out,
                     HIRE_BFLOAT16);
        break;
    default:
        attend_heads(block, heads, q, stride, keys, values, from, to, score, score_stride, out,
                     HIRE_FLOAT16);
        break;
    }
}
