/* Refined rows: candidates' weights as their low-bit copies and 4 bits more; part of kernels_body.h.
 *
 * A neuron's row of `low` holds what the copies left, for gate, up and down in turn: codes around
 * zero and a scale for each block. The copies' own products come from the estimates and, for
 * outputs, from the rest, which runs through all neurons. low_bias is what the estimates' bias lacks.
 *
 * Gate and up run in whole numbers: a word is eight neighbouring inputs, byte i its inputs i (low
 * half) and 4 + i (high half), and every word has its own scale and place among the digits. */

/* Adds 128 inputs, from word 16 i on, of one row. */
INLINE v16 add_low(const uint8_t *row, const uint8_t *scales, const hire_run *run, int64_t i,
                   v16 total, const int lowest)
{
    const w16 word = w_load4(row + 64 * i), mask = w_set1(0x0f0f0f0f);
    const w16 half[2] = {w_and(word, mask), w_and(w_right(word, 4), mask)};
    const int8_t *digits = run->x_digits + 64 * 2 * DIGITS * i;
    w16 sum[DIGITS] = {w_set1(0), w_set1(0), w_set1(0)};
HIRE_UNROLL
    for (int h = 0; h < 2; h++)
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++)
            sum[d] = w_dot_each(sum[d], half[h], digits + 64 * (DIGITS * h + d));
    const w16 first = w_load4((const uint8_t *)(run->x_first + 16 * i));
    const w16 place = w_load4((const uint8_t *)(run->x_place + 16 * i));
    const v16 whole = v_from_w(w_add(from_lowest(sum, lowest), first));
    const v16 scale = v_mul(v_lookup(v_load_f16(scales), place), v_load(run->x_scale + 16 * i));
    return v_fma(whole, scale, total);
}

/* Products of the predictor's input with what the copies left of one row of gate and of up. */
INLINE void low_dots(const hire_layer *layer, const hire_run *run, const uint8_t *gate,
                     const uint8_t *up, const int gated, const int lowest, float *gate_dot,
                     float *up_dot)
{
    const int64_t vectors = (layer->stride + 127) / 128, codes = layer->stride / 2;
    v16 a = v_set1(0.0f), b = a;
    for (int64_t i = 0; i < vectors; i++) {
        const int64_t scales = codes + 2 * (128 * i / layer->block);
        a = add_low(gate, gate + scales, run, i, a, lowest);
        if (gated) b = add_low(up, up + scales, run, i, b, lowest);
    }
    *gate_dot = v_sum(a);
    if (gated) *up_dot = v_sum(b);
}

/* Bytes of gate, or of up, in a row of `low`. */
INLINE int64_t low_part(const hire_layer *layer)
{
    return layer->stride / 2 + 2 * ((layer->width + layer->block - 1) / layer->block);
}

enum { ROWS_AHEAD = 3 };

INLINE void ask_for(const uint8_t *row, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64) prefetch_far(row + at);
}

/* Hidden values and scores of up to 16 candidates. */
INLINE int refined_group(const hire_layer *layer, hire_run *run, int64_t at, int64_t num,
                         int64_t last, const int gated, const int lowest)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, part = low_part(layer);
    float gate[16] = {0}, up[16] = {0}, norm[16] = {0};
    for (int64_t i = 0; i < num; i++) {
        const int64_t neuron = run->index[at + i];
        const int64_t ahead = at + i + ROWS_AHEAD < last ? at + i + ROWS_AHEAD : last;
        const uint8_t *row = layer->low + neuron * layer->low_bytes;
        ask_for(layer->low + run->index[ahead] * layer->low_bytes, layer->low_bytes);
        low_dots(layer, run, row, row + part, gated, lowest, &gate[i], &up[i]);
        gate[i] += run->z[neuron] + layer->low_bias[neuron];
        if (gated) up[i] += run->z[padded + neuron] + layer->low_bias[padded + neuron];
        norm[i] = layer->norm[neuron];
    }
    return finish_group(layer, run, at, num, gate, up, norm);
}

/* What the copies left of output rows; their own rows are the rest's. */
static void low_outputs(const hire_layer *layer, hire_run *run, const int32_t *index,
                        const float *h, int64_t num, float *partial)
{
    const int64_t down = (1 + (layer->gated != 0)) * low_part(layer);
    const uint8_t *row[BATCH];
    for (int64_t i = 0; i < num; i++) row[i] = layer->low + index[i] * layer->low_bytes + down;
    int64_t done = 0;
    for (; done + 4 <= num; done += 4)
        rest_rows(layer, run, row + done, h + done, 4, 4, 1, partial);
    for (; done < num; done++) rest_rows(layer, run, row + done, h + done, 1, 4, 1, partial);
}

INLINE int exact_low(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                     float *partial, const int gated, const int lowest)
{
    int finite = 1;
    for (int64_t at = from; at < to; at += BATCH) {
        const int64_t num = to - at < BATCH ? to - at : BATCH;
        finite &= refined_group(layer, run, at, num, to - 1, gated, lowest);
        if (partial != NULL)
            low_outputs(layer, run, run->index + at, run->h + at, num, partial);
    }
    return finite;
}

static int exact_refined(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                         float *partial)
{
    switch (2 * (layer->gated != 0) + lowest_digit(layer)) {
    case 0: return exact_low(layer, run, from, to, partial, 0, 0);
    case 1: return exact_low(layer, run, from, to, partial, 0, 1);
    case 2: return exact_low(layer, run, from, to, partial, 1, 0);
    default: return exact_low(layer, run, from, to, partial, 1, 1);
    }
}
