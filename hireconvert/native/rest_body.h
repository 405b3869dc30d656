/* Low-bit output rows; part of kernels_body.h.
 *
 * Rows of 4 bits lie in tiles of sixteen neurons and run in whole numbers, those of every neuron: a
 * tile is read as it lies, which is faster than picking rows. Values times scales become whole
 * numbers that share a scale for a tile and a block of outputs, and one instruction adds four
 * neurons to sixteen outputs. A tile holds, for each block, the neurons' scales (of normal levels a
 * byte each, in whole lines); then, unless symmetric, their offsets; then for each 32 outputs 64
 * bytes for every four neurons (byte 4 l + i is neuron i's at output l, low half, and 16 + l, high
 * half). Rows of other widths run one by one, in floats (rest_float_body.h), and only those whose
 * value is not 0. */

#include "rest_float_body.h"

enum {
    FAR = 8192, /* bytes ahead, for the second cache */
    QUADS = HIRE_LANES / 4,
    UNIT = 64 * QUADS, /* bytes of a tile for 32 outputs */
    SPAN = 64          /* vectors of outputs that a table serves, of as many blocks at most */
};

/* What a tile's codes are multiplied with, by block: a digit of four neurons side by side. */
typedef struct {
    int32_t digits[SPAN][QUADS][4];
    float scale[SPAN];
} rest_table;

/* Sums over digits from the `lowest` on, in units of 256^lowest. */
INLINE w16 from_lowest(const w16 *sum, const int lowest)
{
    const w16 high = w_add(w_left(sum[2], 8), sum[1]);
    return lowest ? high : w_add(w_left(high, 8), sum[0]);
}

/* Bytes of a tile's scales for a block, and the scales. */
INLINE int64_t scale_bytes(const int normal) { return normal ? HIRE_LANES : 2 * HIRE_LANES; }

INLINE v16 rest_scale(const uint8_t *scales, const int normal)
{
    return normal ? scale_codes(scales) : v_load_f16(scales);
}

INLINE void fill_table(v16 value, const uint8_t *scales, rest_table *table, int64_t at,
                       const int normal, const int lowest)
{
    prefetch_far(scales + FAR);
    const v16 factor = v_mul(value, rest_scale(scales, normal));
    const float most = v_most(v_max(v_abs(factor), v_set1(HIRE_SMALLEST)));
    const w16 whole = w_round(v_mul(factor, v_set1(HIRE_LARGEST / most)));
    w_store(table->digits[at], w_by_byte(digits_of(whole)));
    table->scale[at] = most * ((lowest ? 256.0f : 1.0f) / HIRE_LARGEST);
}

/* What the codes' zero points add to a block: by lane, for the tiles so far. */
INLINE void add_offset(const hire_layer *layer, v16 value, const uint8_t *scales, float *offset,
                       const int normal)
{
    if (normal) {
        const v16 least = v_mul(scale_codes(scales), v_set1((float)-HIRE_LEVEL_BIAS));
        v_store(offset, v_fma(value, least, v_load(offset)));
        return;
    }
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const uint8_t *offsets = scales + 32 * blocks;
    prefetch_far(offsets + FAR);
    const v16 least = layer->rest_symmetric ? v_mul(v_load_f16(scales), v_set1(-7.5f))
                                            : v_load_f16(offsets);
    v_store(offset, v_fma(value, least, v_load(offset)));
}

/* Adds a unit to two vectors of outputs, whose blocks lie at place[0] and place[1] of the table. */
INLINE void add_rest_unit(const uint8_t *codes, const rest_table *table, const int64_t *place,
                          float *partial, const int normal, const int lowest)
{
    const w16 mask = w_set1(0x0f0f0f0f);
    w16 word[QUADS];
HIRE_UNROLL
    for (int q = 0; q < QUADS; q++) {
        word[q] = w_load4(codes + 64 * q);
        prefetch_far(codes + 64 * q + FAR);
    }
HIRE_UNROLL
    for (int half = 0; half < 2; half++) {
        w16 sum[DIGITS] = {w_set1(0), w_set1(0), w_set1(0)};
HIRE_UNROLL
        for (int q = 0; q < QUADS; q++) {
            w16 code = w_and(half ? w_right(word[q], 4) : word[q], mask);
            if (normal) code = w_table(NORMAL_LEVELS, code);
            const int32_t *digit = table->digits[place[half]][q];
            for (int d = lowest; d < DIGITS; d++)
                sum[d] = w_dot(sum[d], code, (const int8_t *)(digit + d));
        }
        const v16 scale = v_set1(table->scale[place[half]]);
        float *to = partial + 16 * half;
        /* Of normal levels the sums of all digits together do not fit 32 bits. */
        const v16 whole = normal && !lowest ? from_digits(sum, 0) : v_from_w(from_lowest(sum, lowest));
        v_store(to, v_fma(whole, scale, v_load(to)));
    }
}

/* A tile's neurons by their values in one row; the other rows find the tile in the cache. */
INLINE void rest_tile(const hire_layer *layer, const hire_run *run, const uint8_t *scales, v16 value,
                      float *partial, const int normal, const int lowest)
{
    const int64_t vectors = layer->stride / 16, block = layer->rest_block;
    const int64_t blocks = (layer->width + block - 1) / block, size = scale_bytes(normal);
    const uint8_t *codes = scales + (normal ? hire_whole_lines(size * blocks)
                                            : (layer->rest_symmetric ? 1 : 2) * size * blocks);
    float *offset = partial + layer->stride;
    _Alignas(64) rest_table table;
    for (int64_t begin = 0; begin < vectors; begin += SPAN) {
        const int64_t end = begin + SPAN < vectors ? begin + SPAN : vectors;
        const int64_t first = run->rest_scale_of[begin], last = run->rest_scale_of[end - 1];
        for (int64_t b = first; b <= last; b++) {
            fill_table(value, scales + size * b, &table, b - first, normal, lowest);
            if (b * block >= 16 * begin) /* else the span before has added it */
                add_offset(layer, value, scales + size * b, offset + 16 * b, normal);
        }
        for (int64_t v = begin; v < end; v += 2) {
            const int64_t place[2] = {run->rest_scale_of[v] - first,
                                      run->rest_scale_of[v + 1] - first};
            add_rest_unit(codes + v / 2 * UNIT, &table, place, partial + 16 * v, normal, lowest);
        }
    }
}

INLINE void rest_tiles(const hire_layer *layer, hire_run *const *runs, int64_t num_rows, int64_t s,
                       int64_t from, int64_t to, const int normal, const int lowest)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    float *partial[HIRE_ROWS];
    for (int64_t i = 0; i < num_rows; i++) {
        partial[i] = runs[i]->partial + s * runs[i]->partial_stride;
        memset(partial[i] + layer->stride, 0, (size_t)(16 * blocks) * sizeof **partial);
    }
    for (int64_t tile = from / 16; 16 * tile < to; tile++)
        for (int64_t i = 0; i < num_rows; i++) {
            v16 value = v_load(runs[i]->value + 16 * tile);
            if (normal) value = v_mul(value, v_load(layer->rest_unit + 16 * tile));
            rest_tile(layer, runs[i], layer->rest + tile * layer->rest_bytes, value, partial[i],
                      normal, lowest);
        }
    for (int64_t i = 0; i < num_rows; i++) {
        float *offset = partial[i] + layer->stride;
        for (int64_t b = 0; b < blocks; b++) offset[16 * b] = v_sum(v_load(offset + 16 * b));
        for (int64_t v = 0; v < layer->stride / 16; v++)
            v_store(partial[i] + 16 * v,
                    v_add(v_load(partial[i] + 16 * v),
                          v_set1(offset[16 * runs[i]->rest_scale_of[v]])));
    }
}

static void rest_one_by_one(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                            float *partial)
{
    switch (layer->rest_bits) {
    case 2: rest_in_floats(layer, run, from, to, partial, 2); break;
    case 3: rest_in_floats(layer, run, from, to, partial, 3); break;
    default: rest_in_floats(layer, run, from, to, partial, 8); break;
    }
}

static void rest(const hire_layer *layer, hire_run *const *runs, int64_t num_rows, int64_t s,
                 int64_t from, int64_t to)
{
    if (layer->rest_bits != 4)
        for (int64_t i = 0; i < num_rows; i++)
            rest_one_by_one(layer, runs[i], from, to,
                            runs[i]->partial + s * runs[i]->partial_stride);
    else if (lowest_digit(layer))
        layer->rest_normal ? rest_tiles(layer, runs, num_rows, s, from, to, 1, 1)
                           : rest_tiles(layer, runs, num_rows, s, from, to, 0, 1);
    else
        layer->rest_normal ? rest_tiles(layer, runs, num_rows, s, from, to, 1, 0)
                           : rest_tiles(layer, runs, num_rows, s, from, to, 0, 0);
}
