/* Refined rows: candidates' weights as their low-bit copies and 4 bits more; part of kernels_body.h.
 *
 * A neuron's row of `low` (low_rows.h) holds what the copies left, codes around zero and a scale for
 * each block. The copies' own products come from the estimates and, for outputs, from the rest, which
 * runs through all neurons. low_bias is what the estimates' bias lacks. All runs in whole numbers. */

enum {
    LOW_BATCH = 32, /* candidates whose output rows go together */
    LOW_QUADS = LOW_BATCH / 4,
    /* Rows lie apart: what reads them asks for whole ones as far ahead, and for so many more while
     * output rows are added up. */
    ROWS_AHEAD = 3,
    ROWS_MORE = 8
};

/* Adds a vector of words to the sums over digits. */
INLINE void add_words(const uint8_t *words, const int8_t *digits, const int lowest, w16 *sum)
{
    const w16 word = w_load4(words), mask = w_set1(0x0f0f0f0f);
    const w16 half[2] = {w_and(word, mask), w_and(w_right(word, 4), mask)};
HIRE_UNROLL
    for (int h = 0; h < 2; h++)
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++)
            sum[d] = w_dot_each(sum[d], half[h],
                                digits + 64 * ((DIGITS - lowest) * h + d - lowest));
}

/* Adds a group of vectors, whose lanes are blocks with these scales. */
INLINE v16 add_group(const hire_run *run, int64_t group, const uint8_t *words, int64_t from,
                     int64_t num, v16 scale, const int lowest, v16 total)
{
    const int8_t *digits = run->x_digits + 64 * 2 * (DIGITS - lowest) * from;
    w16 sum[DIGITS];
    for (int d = lowest; d < DIGITS; d++) sum[d] = w_set1(0);
    for (int64_t i = 0; i < num; i++)
        add_words(words + 64 * (from + i), digits + 64 * 2 * (DIGITS - lowest) * i, lowest, sum);
    const v16 whole = from_digits(sum, lowest);
    const v16 value = v_fma(whole, v_load(run->x_scale + 16 * group),
                            v_load(run->x_middle + 16 * group));
    return v_fma(value, scale, total);
}

/* Products of the predictor's input with what the copies left of a row, by lane: to be added up over
 * those of gate and over those of up. */
INLINE v16 low_products(const hire_run *run, const uint8_t *row, const int lowest)
{
    const hire_low_rows *low = &run->low;
    const uint8_t *scales = row + low->scales;
    v16 total = v_set1(0.0f);
    for (int64_t group = 0; group < low->full; group++)
        total = add_group(run, group, row, group * low->words, low->words,
                          v_load_f16(scales + 32 * group), lowest, total);
    if (low->left == 0) return total;
    v16 scale = v_load_f16(scales + 32 * low->full);
    if (hire_low_short(low)) scale = v_lookup(scale, w_load4((const uint8_t *)run->x_place));
    return add_group(run, low->full, row, low->full * low->words, low->depth, scale, lowest, total);
}

/* Asks for the row of the candidate at this place, if there is one. A line after the other, so that
 * the memory takes them for a stream. */
INLINE void ask_for(const hire_layer *layer, const hire_run *run, int64_t place)
{
    if (place >= run->last) return;
    const uint8_t *row = layer->low + run->index[place] * layer->low_bytes;
    for (int64_t at = 0; at < layer->low_bytes; at += 64) prefetch(row + at);
}

/* Hidden values and scores of up to 16 candidates. */
INLINE int refined_group(const hire_layer *layer, hire_run *run, int64_t at, int64_t num,
                         const int lowest)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16;
    const int gated = layer->gated != 0;
    float gate[16] = {0}, up[16] = {0}, norm[16] = {0};
    v16 product[16], lower, upper;
    for (int64_t i = 0; i < num; i++) {
        const int64_t neuron = run->index[at + i];
        ask_for(layer, run, at + i + ROWS_AHEAD);
        product[i] = low_products(run, layer->low + neuron * layer->low_bytes, lowest);
        gate[i] = run->z[neuron] + layer->low_bias[neuron];
        if (gated) up[i] = run->z[padded + neuron] + layer->low_bias[padded + neuron];
        norm[i] = layer->norm[neuron];
    }
    for (int64_t i = num; i < 16; i++) product[i] = v_set1(0.0f);
    v_halves(product, &lower, &upper);
    if (!gated) lower = v_add(lower, upper);
    v_store(gate, v_add(v_load(gate), lower));
    v_store(up, v_add(v_load(up), upper));
    return finish_group(layer, run, at, num, gate, up, norm);
}

/* ------------------------------------------------------------------ output rows */

/* What the codes of four rows each are multiplied with in sixteen blocks: digits of values times
 * scales, which share a scale in a block; and what the codes' middle takes off. */
typedef struct {
    int32_t digits[LOW_QUADS][DIGITS][16];
    float scale[16];
    float middle[16];
} low_table;

INLINE void fill_low_table(const uint8_t *const *row, const float *h, int64_t num, int64_t quads,
                           int64_t scales, const int lowest, low_table *table)
{
    const v16 levels = v_set1(HIRE_LARGEST);
    v16 factor[LOW_BATCH], most = v_set1(HIRE_SMALLEST);
    w16 total = w_set1(0);
    for (int64_t i = 0; i < num; i++) {
        factor[i] = v_mul(v_set1(h[i]), v_load_f16(row[i] + scales));
        most = v_max(v_abs(factor[i]), most);
    }
    for (int64_t i = num; i < 4 * quads; i++) factor[i] = v_set1(0.0f);
    const v16 inverse = v_div(levels, most), unit = v_div(most, levels);
    for (int64_t quad = 0; quad < quads; quad++) {
        w16 four[DIGITS];
        for (int d = lowest; d < DIGITS; d++) four[d] = w_set1(0);
HIRE_UNROLL
        for (int i = 0; i < 4; i++) {
            const w16 whole = w_round(v_mul(factor[4 * quad + i], inverse));
            const w16 digits = digits_of(whole);
            total = w_add(total, whole);
            for (int d = lowest; d < DIGITS; d++) {
                const w16 own = w_and(w_right(digits, 8 * d), w_set1(255));
                four[d] = w_or(four[d], w_left(own, 8 * i));
            }
        }
        for (int d = lowest; d < DIGITS; d++) w_store(table->digits[quad][d], four[d]);
    }
    v_store(table->scale, v_mul(unit, v_set1(digit_unit(lowest))));
    v_store(table->middle, v_mul(v_mul(v_from_w(total), unit), v_set1(-HIRE_LOW_MIDDLE)));
}

/* Adds all rows to up to eight vectors of outputs, whose blocks are given. */
INLINE void add_low_line(const uint8_t *const *row, int64_t quads, int64_t line,
                         const low_table *table, const int32_t *block, float *partial,
                         int64_t vectors, const int lowest)
{
    const w16 mask = w_set1(0x0f0f0f0f);
    w16 sum[8][DIGITS];
HIRE_UNROLL
    for (int v = 0; v < 8; v++)
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++) sum[v][d] = w_set1(0);
    for (int64_t quad = 0; quad < quads; quad++) {
        const uint8_t *const *four = row + 4 * quad;
        const w16 word[4] = {w_load4(four[0] + line), w_load4(four[1] + line),
                             w_load4(four[2] + line), w_load4(four[3] + line)};
        w16 mixed[4];
        w_interleave(word, mixed);
HIRE_UNROLL
        for (int v = 0; v < 8; v++) {
            const w16 code = w_and(v < 4 ? mixed[v] : w_right(mixed[v - 4], 4), mask);
HIRE_UNROLL
            for (int d = lowest; d < DIGITS; d++)
                sum[v][d] = w_dot(sum[v][d], code,
                                  (const int8_t *)&table->digits[quad][d][block[v]]);
        }
    }
HIRE_UNROLL
    for (int v = 0; v < 8; v++) {
        if (v >= vectors) break;
        const v16 value = v_add(v_load(partial + 16 * v), v_set1(table->middle[block[v]]));
        v_store(partial + 16 * v,
                v_fma(from_digits(sum[v], lowest), v_set1(table->scale[block[v]]), value));
    }
}

/* What the copies left of up to LOW_BATCH output rows; their own rows are the rest's. Rows of the
 * candidates from place `next` on are asked for meanwhile. */
INLINE void add_low_rows(const hire_layer *layer, const hire_run *run, const uint8_t *const *row,
                         const float *h, int64_t num, int64_t next, float *partial,
                         const int lowest)
{
    const int64_t quads = (num + 3) / 4, vectors = layer->stride / 16, block = layer->rest_block;
    const int64_t blocks = (layer->width + block - 1) / block, most = next + ROWS_MORE;
    _Alignas(64) low_table table;
    for (int64_t first = 0; first < blocks; first += 16) {
        const int64_t begin = first * block / 16;
        const int64_t end = first + 16 < blocks ? (first + 16) * block / 16 : vectors;
        fill_low_table(row, h, num, quads, run->low.down_scales + 2 * first, lowest, &table);
        for (int64_t at = begin; at < end; at += 8) {
            int32_t own[8];
            if (next < most) ask_for(layer, run, next++);
            for (int v = 0; v < 8; v++)
                own[v] = at + v < end ? run->rest_scale_of[at + v] - (int32_t)first : 0;
            add_low_line(row, quads, run->low.down + 8 * at, &table, own, partial + 16 * at,
                         end - at, lowest);
        }
    }
}

static void low_outputs(const hire_layer *layer, hire_run *run, const int32_t *index,
                        const float *h, int64_t num, int64_t next, float *partial)
{
    const uint8_t *row[LOW_BATCH];
    if (num == 0) return;
    for (int64_t i = 0; i < LOW_BATCH; i++)
        row[i] = layer->low + index[i < num ? i : 0] * layer->low_bytes;
    if (lowest_digit(layer))
        add_low_rows(layer, run, row, h, num, next, partial, 1);
    else
        add_low_rows(layer, run, row, h, num, next, partial, 0);
}

/* ------------------------------------------------------------------ candidates */

INLINE int exact_low(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                     float *partial, const int lowest)
{
    int finite = 1;
    for (int64_t at = from; at < to; at += LOW_BATCH) {
        const int64_t num = to - at < LOW_BATCH ? to - at : LOW_BATCH;
        for (int64_t i = 0; i < num; i += 16)
            finite &= refined_group(layer, run, at + i, num - i < 16 ? num - i : 16, lowest);
        if (partial != NULL)
            low_outputs(layer, run, run->index + at, run->h + at, num, at + num + ROWS_AHEAD,
                        partial);
    }
    return finite;
}

static int exact_refined(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                         float *partial)
{
    return lowest_digit(layer) ? exact_low(layer, run, from, to, partial, 1)
                               : exact_low(layer, run, from, to, partial, 0);
}
