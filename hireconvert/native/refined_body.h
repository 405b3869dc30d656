/* Refined rows: candidates' weights as their low-bit copies and 4 bits more; part of kernels_body.h.
 *
 * A neuron's row of `low` holds what the copies left, for gate, up and down in turn: codes around
 * zero (sixteen inputs or outputs side by side, eight codes to a lane's word) and a scale for each
 * block. The copies' own products are there already: the estimates. run->x is the predictor's
 * input, as the estimates had it; low_bias is what their bias lacks. */

enum { SCALES = 64 }; /* converted at once */

/* Products of x with what the copies left of one row of gate and of up. */
INLINE void low_dots(const hire_layer *layer, const uint8_t *gate, const uint8_t *up, const float *x,
                     const int gated, float *gate_dot, float *up_dot)
{
    const int64_t vectors = layer->stride / 16, codes = code_bytes(vectors, 4);
    const int64_t blocks = (layer->width + layer->block - 1) / layer->block;
    const int64_t used = (layer->width + 15) / 16; /* of the vectors: the last may be padding */
    const int64_t each = blocks == 1 ? used : layer->block / 16; /* vectors to a scale */
    v16 a[2] = {v_set1(0.0f), v_set1(0.0f)}, b[2] = {a[0], a[0]};
    for (int64_t first = 0; first < blocks; first += SCALES) {
        const int64_t num = blocks - first < SCALES ? blocks - first : SCALES;
        const int64_t end = first + num == blocks ? used : (first + num) * each;
        float scale[2][SCALES];
        for (int64_t i = 0; i < num; i += 16) {
            v_store(scale[0] + i, v_load_f16(gate + codes + 2 * (first + i)));
            if (gated) v_store(scale[1] + i, v_load_f16(up + codes + 2 * (first + i)));
        }
        int64_t block = 0, left = each;
        for (int64_t v = first * each; v < end;) {
            const int here = (int)(end - v < 8 ? end - v : 8);
            const int64_t bytes = lane_bytes(vectors - v < 8 ? vectors - v : 8, 4);
            const w16 gate_word = load_lanes(gate + v / 8 * 64, bytes);
            const w16 up_word = gated ? load_lanes(up + v / 8 * 64, bytes) : gate_word;
HIRE_UNROLL
            for (int k = 0; k < 8; k++) {
                if (k == here) break;
                const v16 input = v_load(x + 16 * (v + k));
                a[k & 1] = v_fma(v_mul(v_code(gate_word, 4 * k, 4), input),
                                 v_set1(scale[0][block]), a[k & 1]);
                if (gated)
                    b[k & 1] = v_fma(v_mul(v_code(up_word, 4 * k, 4), input),
                                     v_set1(scale[1][block]), b[k & 1]);
                if (--left == 0) {
                    left = each;
                    block++;
                }
            }
            v += here;
        }
    }
    *gate_dot = v_sum(v_add(a[0], a[1]));
    if (gated) *up_dot = v_sum(v_add(b[0], b[1]));
}

/* Bytes of one matrix in a row of `low`; its scales start behind whole vectors of codes. */
INLINE int64_t low_part(const hire_layer *layer, int64_t block)
{
    return code_bytes(layer->stride / 16, 4) + 2 * ((layer->width + block - 1) / block);
}

INLINE void ask_for(const uint8_t *row, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64) prefetch(row + at);
}

/* Hidden values and scores of up to 16 candidates. */
INLINE int refined_group(const hire_layer *layer, hire_run *run, int64_t at, int64_t num,
                         int64_t last, const int gated)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, part = low_part(layer, layer->block);
    float gate[16] = {0}, up[16] = {0}, norm[16] = {0};
    for (int64_t i = 0; i < num; i++) {
        const int64_t neuron = run->index[at + i];
        const int64_t ahead = at + i + 2 < last ? at + i + 2 : last;
        const uint8_t *row = layer->low + neuron * layer->low_bytes;
        ask_for(layer->low + run->index[ahead] * layer->low_bytes, layer->low_bytes);
        low_dots(layer, row, row + part, run->x, gated, &gate[i], &up[i]);
        gate[i] += run->z[neuron] + layer->low_bias[neuron];
        if (gated) up[i] += run->z[padded + neuron] + layer->low_bias[padded + neuron];
        norm[i] = layer->norm[neuron];
    }
    return finish_group(layer, run, at, num, gate, up, norm);
}

/* Output rows of up to BATCH neurons: the copies', then what those left. */
static void refined_outputs(const hire_layer *layer, hire_run *run, const int32_t *index,
                            const float *h, int64_t num, float *partial)
{
    const int64_t down = (1 + (layer->gated != 0)) * low_part(layer, layer->block);
    rest_batch batch;
    batch.quads = (num + 3) / 4;
    for (int64_t i = 0; i < 4 * batch.quads; i++) {
        batch.row[i] = layer->rest + index[i < num ? i : 0] * layer->rest_bytes;
        batch.ahead[i] = layer->low + index[i < num ? i : 0] * layer->low_bytes + down;
        batch.value[i] = i < num ? h[i] : 0.0f;
    }
    add_batch(layer, run, &batch, partial);
    const uint8_t *row[BATCH];
    for (int64_t i = 0; i < num; i++) row[i] = layer->low + index[i] * layer->low_bytes + down;
    int64_t done = 0;
    for (; done + 4 <= num; done += 4)
        rest_rows(layer, run, row + done, h + done, 4, 4, 1, partial);
    for (; done < num; done++) rest_rows(layer, run, row + done, h + done, 1, 4, 1, partial);
}

static int exact_refined(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                         float *partial)
{
    int finite = 1;
    for (int64_t at = from; at < to; at += BATCH) {
        const int64_t num = to - at < BATCH ? to - at : BATCH;
        finite &= layer->gated ? refined_group(layer, run, at, num, to - 1, 1)
                               : refined_group(layer, run, at, num, to - 1, 0);
        if (partial != NULL)
            refined_outputs(layer, run, run->index + at, run->h + at, num, partial);
    }
    return finite;
}
