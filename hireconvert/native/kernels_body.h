/* The kernels, written once over the sixteen-lane vectors of simd_*.h; each kernels_*.c compiles
 * them for its level under its own name. Only loops over whole vectors and fixed pieces: what a
 * function adds up, and in which order, depends on the layer alone. */
#include "round_numbers.h"

#include <stddef.h>
#include <string.h>

/* HIRE_SPECIALISED: types and bits are constants where the code runs. */
#if defined(__GNUC__) && HIRE_SPECIALISED
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#else
#define INLINE static inline
#define NOINLINE
#endif

/* ------------------------------------------------------------------ numbers of several types */

INLINE v16 load_as(const void *base, int64_t place, const int type)
{
    if (type == HIRE_FLOAT32) return v_load((const float *)base + place);
    if (type == HIRE_BFLOAT16) return v_load_bf16((const uint16_t *)base + place);
    return v_load_f16((const uint16_t *)base + place);
}

INLINE int64_t type_size(const int type) { return type == HIRE_FLOAT32 ? 4 : 2; }

INLINE v16 v_exp(v16 x)
{
    x = v_min(v_set1(88.0f), v_max(v_set1(-87.0f), x)); /* NaN stays */
    const v16 n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    v16 r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    v16 p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set1(1.0f));
    /* A NaN becomes some number here, not an undefined conversion. */
    return v_mul(p, v_pow2(v_min(v_max(n, v_set1(-126.0f)), v_set1(127.0f))));
}

/* x / (1 + exp(-a)) */
INLINE v16 times_sigmoid(v16 x, v16 a)
{
    return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_set1(0.0f), a))));
}

/* max(x, 0) - |x| erfc(|x| / sqrt 2) / 2; erfc after Abramowitz and Stegun 7.1.26 (error 1.5e-7). */
INLINE v16 gelu_erf(v16 x)
{
    const v16 size = v_abs(x), w = v_mul(size, v_set1(0.70710678118654752f));
    const v16 t = v_div(v_set1(1.0f), v_fma(w, v_set1(0.3275911f), v_set1(1.0f)));
    v16 p = v_set1(1.061405429f);
    p = v_fma(p, t, v_set1(-1.453152027f));
    p = v_fma(p, t, v_set1(1.421413741f));
    p = v_fma(p, t, v_set1(-0.284496736f));
    p = v_mul(v_fma(p, t, v_set1(0.254829592f)), t);
    p = v_mul(p, v_exp(v_sub(v_set1(0.0f), v_mul(w, w))));
    return v_sub(v_max(v_set1(0.0f), x), v_mul(v_mul(size, v_set1(0.5f)), p));
}

/* Not inlined: it is called once for sixteen neurons and is most of the code otherwise. */
static NOINLINE v16 activate(v16 x, int activation)
{
    switch (activation) {
    case HIRE_GELU_TANH: { /* (1 + tanh a) / 2 = sigmoid(2 a) */
        const v16 inner = v_fma(v_mul(x, x), v_set1(0.044715f), v_set1(1.0f));
        return times_sigmoid(x, v_mul(v_mul(x, inner), v_set1(1.5957691216057308f)));
    }
    case HIRE_GELU_ERF:
        return gelu_erf(x);
    case HIRE_RELU:
        return v_max(v_set1(0.0f), x);
    case HIRE_RELU2: {
        const v16 above = v_max(v_set1(0.0f), x);
        return v_mul(above, above);
    }
    case HIRE_GELU_QUICK:
        return times_sigmoid(x, v_mul(x, v_set1(1.702f)));
    default:
        return times_sigmoid(x, x);
    }
}

/* ------------------------------------------------------------------ whole numbers of three digits */

/* Numbers that share a scale become whole numbers of 24 bits, written in base 256 with digits from
 * -128 to 127: sums of codes times digits are exact, and the scale comes in once at their end. */
enum { DIGITS = 3 };
#define HIRE_LARGEST 8355000.0f
#define HIRE_SMALLEST 1e-30f /* whose inverse times HIRE_LARGEST is still a float */

/* Digits below this one are left out: what is below 2e-5 of the largest in a block is beyond what
 * weights of 16 bits resolve, 4e-3 or 5e-4. */
INLINE int lowest_digit(const hire_layer *layer) { return layer->weight_type != HIRE_FLOAT32; }

/* What a digit counts. */
INLINE float digit_unit(const int digit) { return (float)(1 << 8 * digit); }

/* One digit to a byte, the lowest first; the fourth byte is 0. For |x| of at most HIRE_LARGEST. */
INLINE w16 digits_of(w16 x)
{
    const w16 middle = w_set1(0x808080);
    return w_xor(w_add(x, middle), middle);
}

/* Sums over digits from the `lowest` on, in units of it. */
INLINE v16 from_digits(const w16 *sum, const int lowest)
{
    v16 total = v_from_w(sum[lowest]);
HIRE_UNROLL
    for (int d = lowest + 1; d < DIGITS; d++)
        total = v_fma(v_from_w(sum[d]), v_set1(digit_unit(d - lowest)), total);
    return total;
}

/* The sum of the lanes. */
INLINE int64_t w_total(w16 x)
{
    int32_t lane[16];
    int64_t total = 0;
    w_store(lane, x);
    for (int l = 0; l < 16; l++) total += lane[l];
    return total;
}

/* ------------------------------------------------------------------ the row that comes in */

/* Inputs [at, at + 16) of the predictor, zeros from `end` on. */
INLINE v16 centred(const hire_layer *layer, const float *x, int64_t at, int64_t end)
{
    if (at + 16 <= end)
        return v_mul(v_sub(v_load(x + at), v_load(layer->mean + at)),
                     v_load(layer->inverse_scale + at));
    float some[16] = {0};
    for (int64_t i = 0; at + i < end; i++)
        some[i] = (x[at + i] - layer->mean[at + i]) * layer->inverse_scale[at + i];
    return v_load(some);
}

/* A block of n inputs (n in whole 16s): their digits, the scale (NaN where one is NaN or inf), and the
 * sums of the digits. */
static void split_block(const float *u, int64_t n, int8_t *digits, float *scale, int32_t *sums)
{
    v16 most = v_set1(HIRE_SMALLEST), nothing = v_set1(0.0f);
    for (int64_t j = 0; j < n; j += 16) {
        most = v_max(v_abs(v_load(u + j)), most);
        nothing = v_fma(v_load(u + j), v_set1(0.0f), nothing);
    }
    const float largest = v_most(most);
    const v16 factor = v_set1(HIRE_LARGEST / largest);
    w16 sum = w_set1(0); /* lane l: of digit l % 4 */
    for (int64_t j = 0; j < n; j += 16) {
        w_store(digits + 4 * j, w_by_byte(digits_of(w_round(v_mul(v_load(u + j), factor)))));
        sum = w_dot_each(sum, w_set1(0x01010101), digits + 4 * j);
    }
    int32_t lane[16];
    w_store(lane, sum);
    for (int d = 0; d < 4; d++) sums[d] = lane[d] + lane[d + 4] + lane[d + 8] + lane[d + 12];
    *scale = largest / HIRE_LARGEST + v_sum(nothing);
}

/* The predictor's inputs as digits, four inputs at a time, and for every block the scale, the sum
 * and where sums of codes begin, so that they end up around zero; where an input is NaN or inf,
 * scale and sum are NaN. */
static void split_inputs(const hire_layer *layer, hire_run *run)
{
    const int64_t width = layer->width, padded = (layer->block + 31) / 32 * 32;
    const int lowest = lowest_digit(layer);
    for (int64_t begin = 0, b = 0; begin < width; begin += layer->block, b++) {
        const int64_t end = begin + layer->block < width ? begin + layer->block : width;
        int32_t sums[4];
        for (int64_t j = 0; j < padded; j += 16)
            v_store(run->u + j, centred(layer, run->x, begin + j, end));
        split_block(run->u, padded, run->u_digits + 4 * padded * b, &run->u_scale[b], sums);
        const int64_t total = sums[0] + 256 * (int64_t)sums[1] + 65536 * (int64_t)sums[2];
        const int64_t counted = lowest ? (total - sums[0]) / 256 : total;
        const int64_t first = layer->normal ? -HIRE_LEVEL_BIAS * counted
                                            : (counted * (1 - (1 << layer->bits)) - 1) / 2;
        run->u_sum[b] = (float)total * run->u_scale[b];
        for (int d = lowest; d < DIGITS; d++) {
            const int64_t above = first >> 8 * (d - lowest);
            run->u_first[4 * b + d] = (int32_t)(d + 1 < DIGITS ? above & 255 : above);
        }
        run->u_scale[b] *= digit_unit(lowest);
    }
}

/* Digits, scale and middle of a group of vectors for refined rows, all of which have been zeros. */
INLINE void end_group(hire_run *run, int64_t group, int64_t from, int64_t to, const int lowest)
{
    w16 sum[DIGITS];
    float scale[16];
    for (int d = lowest; d < DIGITS; d++) sum[d] = w_set1(0);
    for (int64_t i = 2 * from; i < 2 * to; i++)
        for (int d = lowest; d < DIGITS; d++)
            sum[d] = w_dot_each(sum[d], w_set1(0x01010101),
                                run->x_digits + 64 * ((DIGITS - lowest) * i + d - lowest));
    for (int64_t l = 0; l < 16; l++) {
        const int64_t part = l / run->low.lanes, at = l % run->low.lanes;
        const int64_t left = group < run->low.full ? run->low.lanes : run->low.left;
        const int64_t each = group < run->low.full ? 1 : run->low.each;
        const int64_t own = at / each < left ? at / each : left - 1;
        scale[l] = run->u_scale[group * run->low.lanes + own];
        if (group == run->low.full) run->x_place[l] = (int32_t)(part * left + own);
    }
    const v16 middle = v_mul(from_digits(sum, lowest), v_set1(-HIRE_LOW_MIDDLE));
    v_store(run->x_scale + 16 * group, v_load(scale));
    v_store(run->x_middle + 16 * group, v_mul(middle, v_load(scale)));
}

/* The inputs' digits once more, for refined rows, each at the lanes of its block. */
INLINE void spread_from(const hire_layer *layer, hire_run *run, const int lowest)
{
    const hire_low_rows *low = &run->low;
    const int64_t padded = (layer->block + 31) / 32 * 32, digits = DIGITS - lowest;
    memset(run->x_digits, 0, (size_t)(64 * 2 * digits * low->vectors));
    for (int64_t begin = 0, b = 0; begin < layer->width; begin += layer->block, b++) {
        const int8_t *own = run->u_digits + 4 * padded * b;
        for (int64_t word = 0; word < low->words; word++, own += 32) {
            int8_t *to = run->x_digits + 64 * 2 * digits * hire_low_vector(low, b, word);
            for (int64_t lane = hire_low_lane(low, 0, b, word); lane < 16; lane += low->lanes)
                for (int64_t half = 0; half < 2; half++)
                    for (int64_t d = 0; d < digits; d++)
                        memcpy(to + 64 * (digits * half + d) + 4 * lane,
                               own + 16 * half + 4 * (lowest + d), 4);
        }
    }
    for (int64_t group = 0; group < low->full; group++)
        end_group(run, group, group * low->words, (group + 1) * low->words, lowest);
    if (low->left > 0)
        end_group(run, low->full, low->full * low->words, low->vectors, lowest);
}

static void spread_inputs(const hire_layer *layer, hire_run *run)
{
    if (lowest_digit(layer))
        spread_from(layer, run, 1);
    else
        spread_from(layer, run, 0);
}

static void start(const hire_layer *layer, const void *x, int type, hire_run *run)
{
    const int64_t width = layer->width, whole = width / 16 * 16;
    for (int64_t j = 0; j < whole; j += 16) v_store(run->x + j, load_as(x, j, type));
    if (whole < width) {
        unsigned char tail[64] = {0};
        float wide[16];
        const int64_t size = type_size(type);
        memcpy(tail, (const char *)x + whole * size, (size_t)((width - whole) * size));
        v_store(wide, load_as(tail, 0, type));
        memcpy(run->x + whole, wide, (size_t)(width - whole) * sizeof(float));
    }
    for (int64_t j = width; j < layer->stride; j++) run->x[j] = 0.0f;
    if (hire_estimates(layer)) split_inputs(layer, run);
    if (layer->low != NULL) spread_inputs(layer, run);
    if (layer->rest != NULL)
        for (int64_t j = 0; j < layer->stride; j += 16)
            run->rest_scale_of[j / 16] =
                (int32_t)((j < width ? j : width - 1) / layer->rest_block);
}

/* ------------------------------------------------------------------ selection */

#include "select_body.h"

/* ------------------------------------------------------------------ estimates */

#include "estimate_body.h"

/* ------------------------------------------------------------------ the rest, by low-bit rows */

#include "rest_body.h"

/* ------------------------------------------------------------------ exact rows */

/* h and exact of up to 16 candidates, from what their rows of gate and up give. */
INLINE int finish_group(const hire_layer *layer, hire_run *run, int64_t at, int64_t num,
                        const float *gate, const float *up, const float *norm)
{
    float out[16];
    v16 h = activate(v_load(gate), (int)layer->activation);
    if (layer->gated) h = v_mul(h, v_load(up));
    const v16 score = v_mul(v_abs(h), v_load(norm));
    v_store(out, h);
    memcpy(run->h + at, out, (size_t)num * sizeof *out);
    v_store(out, score);
    memcpy(run->exact + at, out, (size_t)num * sizeof *out);
    return v_finite(score);
}

#include "refined_body.h"

/* Products of x with one row of gate and of up; the next neuron's rows are asked for meanwhile. */
INLINE void dots(const void *row, const char *next, const float *x, int64_t stride,
                 const int type, const int gated, float *gate, float *up)
{
    v16 a = v_set1(0.0f), b = a, c = a, d = a;
    for (int64_t j = 0; j < stride; j += 32) {
        const v16 x0 = v_load(x + j), x1 = v_load(x + j + 16);
        const int64_t ahead = j * type_size(type);
        prefetch(next + ahead);
        if (type == HIRE_FLOAT32) prefetch(next + ahead + 64);
        a = v_fma(load_as(row, j, type), x0, a);
        b = v_fma(load_as(row, j + 16, type), x1, b);
        if (gated) {
            const int64_t second = stride * type_size(type) + ahead;
            prefetch(next + second);
            if (type == HIRE_FLOAT32) prefetch(next + second + 64);
            c = v_fma(load_as(row, stride + j, type), x0, c);
            d = v_fma(load_as(row, stride + j + 16, type), x1, d);
        }
    }
    *gate = v_sum(v_add(a, b));
    if (gated) *up = v_sum(v_add(c, d));
}

/* Adds h[i] * row[i] to the sums; `ahead` are rows to ask for meanwhile. */
INLINE void add_rows(float *sum, const float *h, const void *const *row, const void *const *ahead,
                     int64_t stride, const int num, const int type)
{
    v16 weight[4];
    for (int i = 0; i < num; i++) weight[i] = v_set1(h[i]);
    for (int64_t j = 0; j < stride; j += 32) {
        v16 a = v_load(sum + j), b = v_load(sum + j + 16);
        for (int i = 0; i < num; i++) {
            const char *next = (const char *)ahead[i] + j * type_size(type);
            prefetch(next);
            if (type == HIRE_FLOAT32) prefetch(next + 64);
            a = v_fma(load_as(row[i], j, type), weight[i], a);
            b = v_fma(load_as(row[i], j + 16, type), weight[i], b);
        }
        v_store(sum + j, a);
        v_store(sum + j + 16, b);
    }
}

/* Output rows of some neurons, four at a time; a value of 0 reads nothing. */
INLINE void add_outputs(const hire_layer *layer, const int32_t *index, const float *h, int64_t num,
                        float *sum, const int type)
{
    const int64_t parts = 1 + (layer->gated != 0), stride = layer->stride;
    const int64_t row_bytes = (parts + 1) * stride * type_size(type);
    const char *base = (const char *)layer->rows + parts * stride * type_size(type);
    const void *row[8];
    float weight[8];
    int held = 0;
    for (int64_t i = 0; i < num; i++) {
        if (h[i] == 0.0f) continue;
        row[held] = base + index[i] * row_bytes;
        weight[held++] = h[i];
        if (held == 8) {
            add_rows(sum, weight, row, row + 4, stride, 4, type);
            memcpy(weight, weight + 4, 4 * sizeof *weight);
            memcpy(row, row + 4, 4 * sizeof *row);
            held = 4;
        }
    }
    for (int done = 0; done < held;) {
        const int now = held - done >= 4 ? 4 : 1;
        if (now == 4)
            add_rows(sum, weight + done, row + done, row + done, stride, 4, type);
        else
            add_rows(sum, weight + done, row + done, row + done, stride, 1, type);
        done += now;
    }
}

/* Hidden values and scores of up to 16 candidates. */
INLINE int exact_group(const hire_layer *layer, hire_run *run, int64_t at, int64_t num,
                       int64_t last, const int type)
{
    const int gated = layer->gated != 0;
    const int64_t stride = layer->stride, neurons = layer->num_neurons;
    const int64_t row_bytes = (2 + gated) * stride * type_size(type);
    const char *base = layer->rows;
    float gate[16] = {0}, up[16] = {0}, norm[16] = {0};
    for (int64_t i = 0; i < num; i++) {
        const int64_t neuron = run->index[at + i];
        const int64_t next = run->index[at + i + (at + i < last ? 1 : 0)];
        if (gated)
            dots(base + neuron * row_bytes, base + next * row_bytes, run->x, stride, type, 1,
                 &gate[i], &up[i]);
        else
            dots(base + neuron * row_bytes, base + next * row_bytes, run->x, stride, type, 0,
                 &gate[i], &up[i]);
        norm[i] = layer->norm[neuron];
        if (layer->row_bias != NULL) {
            gate[i] += layer->row_bias[neuron];
            if (gated) up[i] += layer->row_bias[neurons + neuron];
        }
    }
    return finish_group(layer, run, at, num, gate, up, norm);
}

static NOINLINE void outputs_f32(const hire_layer *layer, const int32_t *index, const float *h,
                                 int64_t num, float *sum)
{
    add_outputs(layer, index, h, num, sum, HIRE_FLOAT32);
}

static NOINLINE void outputs_bf16(const hire_layer *layer, const int32_t *index, const float *h,
                                  int64_t num, float *sum)
{
    add_outputs(layer, index, h, num, sum, HIRE_BFLOAT16);
}

static NOINLINE void outputs_f16(const hire_layer *layer, const int32_t *index, const float *h,
                                 int64_t num, float *sum)
{
    add_outputs(layer, index, h, num, sum, HIRE_FLOAT16);
}

static void outputs(const hire_layer *layer, const int32_t *index, const float *h, int64_t num,
                    float *sum)
{
    if (layer->weight_type == HIRE_FLOAT32)
        outputs_f32(layer, index, h, num, sum);
    else if (layer->weight_type == HIRE_BFLOAT16)
        outputs_bf16(layer, index, h, num, sum);
    else
        outputs_f16(layer, index, h, num, sum);
}

INLINE int exact_as(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                    float *partial, const int type)
{
    int finite = 1;
    for (int64_t at = from; at < to; at += 16) {
        const int64_t num = to - at < 16 ? to - at : 16;
        finite &= exact_group(layer, run, at, num, to - 1, type);
        if (partial != NULL)
            outputs(layer, run->index + at, run->h + at, num, partial);
    }
    return finite;
}

static int exact(const hire_layer *layer, hire_run *run, int64_t from, int64_t to, float *partial)
{
    if (layer->low != NULL) return exact_refined(layer, run, from, to, partial);
    if (layer->weight_type == HIRE_FLOAT32)
        return exact_as(layer, run, from, to, partial, HIRE_FLOAT32);
    if (layer->weight_type == HIRE_BFLOAT16)
        return exact_as(layer, run, from, to, partial, HIRE_BFLOAT16);
    return exact_as(layer, run, from, to, partial, HIRE_FLOAT16);
}

/* Of refined rows only what the copies left: the rest runs through all neurons. */
static void kept(const hire_layer *layer, hire_run *run, int64_t from, int64_t to, float *partial)
{
    int32_t index[LOW_BATCH];
    float h[LOW_BATCH];
    for (int64_t at = from; at < to; at += LOW_BATCH) {
        const int64_t num = to - at < LOW_BATCH ? to - at : LOW_BATCH;
        for (int64_t i = 0; i < num; i++) {
            const int32_t place = run->chosen[at + i];
            index[i] = run->index[place];
            h[i] = run->h[place];
        }
        if (layer->low != NULL)
            low_outputs(layer, run, index, h, num, run->last, partial);
        else
            outputs(layer, index, h, num, partial);
    }
}

/* ------------------------------------------------------------------ the row that goes out */

static void store_as(void *to, const float *from, int64_t num, int type)
{
    if (type == HIRE_FLOAT32)
        memcpy(to, from, (size_t)num * sizeof *from);
    else
        for (int64_t j = 0; j < num; j++) {
            const uint16_t half = type == HIRE_BFLOAT16 ? to_bfloat16(from[j])
                                                        : to_float16(from[j]);
            memcpy((char *)to + 2 * j, &half, sizeof half);
        }
}

static void add_to(float *to, const float *from, int64_t num)
{
    int64_t j = 0;
    for (; j + 16 <= num; j += 16) v_store(to + j, v_add(v_load(to + j), v_load(from + j)));
    for (; j < num; j++) to[j] += from[j];
}

/* Sixteen outputs: what is left to add of the pieces, by pairs. */
INLINE v16 all_pieces(const hire_run *run, int64_t at)
{
    v16 sum[HIRE_SEGMENTS];
    int64_t pieces[HIRE_SEGMENTS], num = 0;
    for (int64_t s = 0; s < HIRE_SEGMENTS; s += run->together[s]) {
        sum[num] = v_load(run->partial + s * run->partial_stride + at);
        pieces[num++] = run->together[s];
        for (; num > 1 && pieces[num - 1] == pieces[num - 2]; num--) {
            sum[num - 2] = v_add(sum[num - 2], sum[num - 1]);
            pieces[num - 2] *= 2;
        }
    }
    return sum[0];
}

/* Columns [from, to), whole vectors, of a row's output. */
static void sum_pieces(const hire_layer *layer, const hire_run *run, int64_t from, int64_t to,
                       float *out)
{
    for (int64_t j = from; j < to; j += 16) v_store(out + j, all_pieces(run, j));
    if (layer->down_bias != NULL)
        for (int64_t j = from; j < to && j < layer->width; j++) out[j] += layer->down_bias[j];
}

static void finish(const hire_layer *layer, hire_run *run, void *y, int type)
{
    float *out = run->x; /* no longer needed, and as long */
    sum_pieces(layer, run, 0, layer->stride, out);
    store_as(y, out, layer->width, type);
}
