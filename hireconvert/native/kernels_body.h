/* The kernels, written once over the sixteen-lane vectors of simd_*.h; each kernels_*.c compiles
 * them for its level under its own name. Only loops over whole vectors and fixed pieces: what a
 * function adds up, and in which order, depends on the layer alone. */
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

/* ------------------------------------------------------------------ packed codes */

/* Codes of one lane lie in 32-bit words, as many whole codes as fit; what is left over takes the
 * narrowest of 8, 16 and 32 bits (pack_lanes in hireconvert/_native.py writes them). */
INLINE int64_t lane_bytes(int64_t codes, const int bits)
{
    if (codes == 0) return 0;
    return codes <= 8 / bits ? 1 : codes <= 16 / bits ? 2 : 4;
}

INLINE int64_t code_bytes(int64_t codes, const int bits)
{
    const int per_word = 32 / bits;
    return HIRE_LANES * (codes / per_word * 4 + lane_bytes(codes % per_word, bits));
}

INLINE w16 load_lanes(const uint8_t *p, int64_t bytes)
{
    return bytes == 4 ? w_load4(p) : bytes == 2 ? w_load2(p) : w_load1(p);
}

/* ------------------------------------------------------------------ the row that comes in */

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
    if (layer->tiles == NULL) return;
    for (int64_t j = 0; j < width; j++)
        run->u[j] = (run->x[j] - layer->mean[j]) * layer->inverse_scale[j];
    for (int64_t begin = 0, b = 0; begin < width; begin += layer->block, b++) {
        const int64_t end = begin + layer->block < width ? begin + layer->block : width;
        v16 sum = v_set1(0.0f);
        int64_t j = begin;
        for (; j + 16 <= end; j += 16) sum = v_add(sum, v_load(run->u + j));
        float total = v_sum(sum);
        for (; j < end; j++) total += run->u[j];
        run->u_sum[b] = total;
    }
    if (layer->rest != NULL)
        for (int64_t j = 0; j < layer->stride; j += 16)
            run->rest_scale_of[j / 16] =
                (int32_t)((j < width ? j : width - 1) / layer->rest_block);
}

/* ------------------------------------------------------------------ estimates */

enum { PREFETCH = 1024 }; /* bytes ahead in a tile's codes */

/* The sums over n inputs of (code - middle) * u of a tile's neurons, of one part or of both. */
INLINE void add_codes(const uint8_t *gate, const uint8_t *up, const float *u, int64_t n,
                      const int bits, v16 *gate_sum, v16 *up_sum)
{
    const int per_word = 32 / bits;
    v16 gate_even = v_set1(0.0f), gate_odd = gate_even, up_even = gate_even, up_odd = gate_even;
    for (; n >= per_word; n -= per_word, u += per_word) {
        const w16 up_word = w_load4(up);
        const w16 gate_word = gate != NULL ? w_load4(gate) : up_word;
        prefetch(up + PREFETCH);
        if (gate != NULL) prefetch(gate + PREFETCH);
HIRE_UNROLL
        for (int k = 0; k < per_word; k++) {
            const v16 input = v_set1(u[k]);
            v16 *up_to = k & 1 ? &up_odd : &up_even, *gate_to = k & 1 ? &gate_odd : &gate_even;
            *up_to = v_fma(v_code(up_word, k * bits, bits), input, *up_to);
            if (gate != NULL) *gate_to = v_fma(v_code(gate_word, k * bits, bits), input, *gate_to);
        }
        up += 4 * HIRE_LANES;
        if (gate != NULL) gate += 4 * HIRE_LANES;
    }
    if (n > 0) {
        const int64_t bytes = lane_bytes(n, bits);
        const w16 up_word = load_lanes(up, bytes);
        const w16 gate_word = gate != NULL ? load_lanes(gate, bytes) : up_word;
        for (int k = 0; k < n; k++) {
            const v16 input = v_set1(u[k]);
            up_even = v_fma(v_code(up_word, k * bits, bits), input, up_even);
            if (gate != NULL)
                gate_even = v_fma(v_code(gate_word, k * bits, bits), input, gate_even);
        }
    }
    *up_sum = v_add(up_even, up_odd);
    *gate_sum = v_add(gate_even, gate_odd);
}

/* What the middle code means where code 0 means the offset. */
INLINE v16 middle_value(v16 scale, const void *offset, const int bits)
{
    return v_fma(scale, v_set1((float)((1 << bits) - 1) / 2), v_load_f16(offset));
}

INLINE void estimate_tile(const hire_layer *layer, const hire_run *run, int64_t tile,
                          const int bits, const int gated, v16 *gate_z, v16 *up_z)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16;
    const uint8_t *p = layer->tiles + tile * layer->tile_bytes;
    const float *bias = layer->bias + tile * 16;
    v16 gate = v_load(bias), up = gated ? v_load(bias + padded) : gate;
    const int symmetric = layer->symmetric != 0;
    for (int64_t begin = 0, b = 0; begin < layer->width; begin += layer->block, b++) {
        const int64_t left = layer->width - begin, n = left < layer->block ? left : layer->block;
        const int64_t bytes = code_bytes(n, bits);
        const uint8_t *up_codes = gated ? p + bytes : p;
        const v16 total = v_set1(run->u_sum[b]);
        v16 up_sum, gate_sum;
        add_codes(gated ? p : NULL, up_codes, run->u + begin, n, bits, &gate_sum, &up_sum);
        p += (1 + gated) * bytes;
        const uint8_t *offsets = p + 32 * (1 + gated);
        const v16 up_scale = v_load_f16(p + 32 * gated);
        up = v_fma(up_scale, up_sum, up);
        if (!symmetric) up = v_fma(middle_value(up_scale, offsets + 32 * gated, bits), total, up);
        if (gated) {
            const v16 gate_scale = v_load_f16(p);
            gate = v_fma(gate_scale, gate_sum, gate);
            if (!symmetric) gate = v_fma(middle_value(gate_scale, offsets, bits), total, gate);
        }
        p = symmetric ? offsets : offsets + 32 * (1 + gated);
    }
    *gate_z = gate;
    *up_z = up;
}

/* Root mean square of the values one typical error above and below. */
INLINE v16 two_points(v16 above, v16 below)
{
    const v16 sum = v_fma(above, above, v_mul(below, below));
    return v_sqrt(v_mul(sum, v_set1(0.5f)));
}

INLINE int finish_tile(const hire_layer *layer, hire_run *run, int64_t tile, const int gated,
                       v16 gate, v16 up)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, at = tile * 16;
    const int act = (int)layer->activation;
    v_store(run->z + at, gated ? gate : up);
    if (gated) v_store(run->z + padded + at, up);
    const v16 first = gated ? gate : up;
    v16 value = activate(first, act), size;
    if (gated) value = v_mul(value, up);
    if (layer->soft == NULL) {
        size = v_abs(value);
    } else {
        const v16 s = v_load(layer->soft + at);
        size = two_points(activate(v_add(first, s), act), activate(v_sub(first, s), act));
        if (gated) {
            const v16 t = v_load(layer->soft + padded + at);
            size = v_mul(size, two_points(v_add(up, t), v_sub(up, t)));
        }
    }
    const v16 score = v_mul(size, v_load(layer->norm + at));
    v_store(run->score + at, score);
    if (layer->rest != NULL) v_store(run->value + at, value);
    return v_finite(score);
}

INLINE int estimate_as(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                       const int bits, const int gated)
{
    int finite = 1;
    for (int64_t tile = from; tile < to; tile++) {
        v16 gate, up;
        estimate_tile(layer, run, tile, bits, gated, &gate, &up);
        finite &= finish_tile(layer, run, tile, gated, gate, up);
    }
    return finite;
}

static int estimate(const hire_layer *layer, hire_run *run, int64_t from, int64_t to)
{
    switch (layer->bits * 2 + (layer->gated != 0)) {
    case 4: return estimate_as(layer, run, from, to, 2, 0);
    case 5: return estimate_as(layer, run, from, to, 2, 1);
    case 6: return estimate_as(layer, run, from, to, 3, 0);
    case 7: return estimate_as(layer, run, from, to, 3, 1);
    case 8: return estimate_as(layer, run, from, to, 4, 0);
    default: return estimate_as(layer, run, from, to, 4, 1);
    }
}

/* ------------------------------------------------------------------ exact rows */

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
    const int gated = layer->gated != 0, act = (int)layer->activation;
    const int64_t stride = layer->stride, neurons = layer->num_neurons;
    const int64_t row_bytes = (2 + gated) * stride * type_size(type);
    const char *base = layer->rows;
    float gate[16] = {0}, up[16] = {0}, norm[16] = {0}, out[16];
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
    v16 h = activate(v_load(gate), act);
    if (gated) h = v_mul(h, v_load(up));
    const v16 score = v_mul(v_abs(h), v_load(norm));
    v_store(out, h);
    memcpy(run->h + at, out, (size_t)num * sizeof *out);
    v_store(out, score);
    memcpy(run->exact + at, out, (size_t)num * sizeof *out);
    return v_finite(score);
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
    if (layer->weight_type == HIRE_FLOAT32)
        return exact_as(layer, run, from, to, partial, HIRE_FLOAT32);
    if (layer->weight_type == HIRE_BFLOAT16)
        return exact_as(layer, run, from, to, partial, HIRE_BFLOAT16);
    return exact_as(layer, run, from, to, partial, HIRE_FLOAT16);
}

static void kept(const hire_layer *layer, hire_run *run, int64_t from, int64_t to, float *partial)
{
    int32_t index[64];
    float h[64];
    for (int64_t at = from; at < to; at += 64) {
        const int64_t num = to - at < 64 ? to - at : 64;
        for (int64_t i = 0; i < num; i++) {
            const int32_t place = run->chosen[at + i];
            index[i] = run->index[place];
            h[i] = run->h[place];
        }
        outputs(layer, index, h, num, partial);
    }
}

/* ------------------------------------------------------------------ the rest, by low-bit rows */

/* Value times scale for each block of `num` rows; what the offsets add is summed by block. */
INLINE void rest_scales(const hire_layer *layer, const uint8_t *const *row, const float *value,
                        const int num, const int bits, float *scale, float *offset)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const int64_t padded = (blocks + 15) / 16 * 16, codes = code_bytes(layer->stride / 16, bits);
    for (int64_t b = 0; b < padded; b += 16) {
        v16 sum = v_load(offset + b);
        for (int i = 0; i < num; i++) {
            const uint8_t *own = row[i] + codes + 2 * b;
            const v16 v = v_set1(value[i]), s = v_load_f16(own);
            v_store(scale + i * padded + b, v_mul(v, s));
            if (!layer->rest_symmetric)
                sum = v_fma(v, middle_value(s, own + 2 * blocks, bits), sum);
        }
        v_store(offset + b, sum);
    }
}

INLINE void rest_vector(float *sum, const w16 *word, const float *scale, int64_t padded,
                        const int num, const int shift, const int bits)
{
    v16 a = v_load(sum);
    for (int i = 0; i < num; i++)
        a = v_fma(v_code(word[i], shift, bits), v_set1(scale[i * padded]), a);
    v_store(sum, a);
}

INLINE void rest_rows(const hire_layer *layer, const hire_run *run, const uint8_t *const *row,
                      const float *value, const int num, const int bits, float *partial)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const int64_t padded = (blocks + 15) / 16 * 16;
    float *offset = partial + layer->stride, *scale = offset + padded;
    rest_scales(layer, row, value, num, bits, scale, offset);
    const int per_word = 32 / bits;
    const int32_t *block = run->rest_scale_of;
    int64_t left = layer->stride / 16, at = 0;
    for (; left >= per_word; left -= per_word, at += 4 * HIRE_LANES) {
        w16 word[4];
        for (int i = 0; i < num; i++) word[i] = w_load4(row[i] + at);
HIRE_UNROLL
        for (int k = 0; k < per_word; k++) {
            rest_vector(partial, word, scale + *block++, padded, num, k * bits, bits);
            partial += 16;
        }
    }
    if (left > 0) {
        w16 word[4];
        const int64_t bytes = lane_bytes(left, bits);
        for (int i = 0; i < num; i++) word[i] = load_lanes(row[i] + at, bytes);
        for (int k = 0; k < left; k++, partial += 16)
            rest_vector(partial, word, scale + *block++, padded, num, k * bits, bits);
    }
}

INLINE void rest_as(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                    float *partial, const int bits)
{
    const uint8_t *row[4];
    float value[4];
    int held = 0;
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    float *offset = partial + layer->stride;
    memset(offset, 0, (size_t)((blocks + 15) / 16 * 16) * sizeof *offset);
    for (int64_t i = from; i < to; i++) {
        if (run->value[i] == 0.0f) continue;
        row[held] = layer->rest + i * layer->rest_bytes;
        value[held++] = run->value[i];
        for (int64_t at = 0; at < layer->rest_bytes; at += 64) prefetch(row[held - 1] + at);
        if (held == 4) {
            rest_rows(layer, run, row, value, 4, bits, partial);
            held = 0;
        }
    }
    for (int i = 0; i < held; i++) rest_rows(layer, run, row + i, value + i, 1, bits, partial);
    for (int64_t j = 0; j < layer->stride; j += 16)
        v_store(partial + j,
                v_add(v_load(partial + j), v_set1(offset[run->rest_scale_of[j / 16]])));
}

static void rest(const hire_layer *layer, hire_run *run, int64_t from, int64_t to, float *partial)
{
    switch (layer->rest_bits) {
    case 2: rest_as(layer, run, from, to, partial, 2); break;
    case 3: rest_as(layer, run, from, to, partial, 3); break;
    case 4: rest_as(layer, run, from, to, partial, 4); break;
    default: rest_as(layer, run, from, to, partial, 8); break;
    }
}

/* ------------------------------------------------------------------ the row that goes out */

/* To the nearest, ties to even, as PyTorch rounds. */
static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint16_t to_float16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (size < 0x38800000) { /* subnormal: adding 0.5 rounds at 2^-24 */
        float small;
        uint32_t rounded;
        memcpy(&small, &size, sizeof small);
        small += 0.5f;
        memcpy(&rounded, &small, sizeof rounded);
        return (uint16_t)(sign | (rounded - 0x3f000000));
    }
    const uint32_t odd = size >> 13 & 1;
    return (uint16_t)(sign | (size - 0x38000000 + 0xfff + odd) >> 13);
}

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

static void finish(const hire_layer *layer, hire_run *run, void *y, int type)
{
    const int64_t width = layer->width;
    float *out = run->x; /* no longer needed, and as long */
    for (int64_t j = 0; j < layer->stride; j += 16) {
        v16 sum = v_load(run->partial + j);
        for (int64_t s = 1; s < HIRE_SEGMENTS; s++)
            sum = v_add(sum, v_load(run->partial + s * run->partial_stride + j));
        v_store(out + j, sum);
    }
    if (layer->down_bias != NULL)
        for (int64_t j = 0; j < width; j++) out[j] += layer->down_bias[j];
    store_as(y, out, width, type);
}
