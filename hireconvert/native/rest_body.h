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
    SPAN = 64          /* blocks of outputs that a table serves */
};

/* What a tile's codes are multiplied with, by block: a digit of four neurons side by side. */
typedef struct {
    int32_t digits[QUADS][SPAN][4];
    float scale[SPAN][4]; /* one of the four is used */
} rest_table;

/* Sums over digits from the `lowest` on, in units of 256^lowest. */
INLINE w16 from_lowest(const w16 *sum, const int lowest)
{
    const w16 high = w_add(w_left(sum[2], 8), sum[1]);
    return lowest ? high : w_add(w_left(high, 8), sum[0]);
}

/* Bytes of a tile's scales for a block. */
INLINE int64_t scale_bytes(const int normal) { return normal ? HIRE_LANES : 2 * HIRE_LANES; }

/* Of values times scales in one block of outputs. */
INLINE void fill_block(v16 value, const uint8_t *scales, rest_table *table, int64_t at,
                       const int lowest)
{
    int32_t digits[QUADS][4];
    prefetch_far(scales + FAR);
    const v16 factor = v_mul(value, v_load_f16(scales));
    const float most = v_most(v_max(v_abs(factor), v_set1(HIRE_SMALLEST)));
    const w16 whole = w_round(v_mul(factor, v_set1(HIRE_LARGEST / most)));
    w_store(digits, w_by_byte(digits_of(whole)));
    for (int q = 0; q < QUADS; q++) memcpy(table->digits[q][at], digits[q], sizeof *digits);
    table->scale[at][0] = most * (digit_unit(lowest) / HIRE_LARGEST);
}

/* What the codes' zero points add to a block: by lane, for the tiles so far. */
INLINE void add_offset(const hire_layer *layer, v16 value, const uint8_t *scales, float *offset)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const uint8_t *offsets = scales + 32 * blocks;
    prefetch_far(offsets + FAR);
    const v16 least = layer->rest_symmetric ? v_mul(v_load_f16(scales), v_set1(-7.5f))
                                            : v_load_f16(offsets);
    v_store(offset, v_fma(value, least, v_load(offset)));
}

/* The same where levels are normal, of four blocks, whose scales are a line: a quarter of a vector is
 * a block, its lanes are four neurons. `offset` likewise has four lanes for each block. */
INLINE void fill_four_blocks(const v16 *value, const uint8_t *scales, rest_table *table,
                             int64_t at, float *offset, const int lowest)
{
    const w16 line = w_load4(scales);
    v16 factor[QUADS], most = v_set1(HIRE_SMALLEST), sum = v_set1(0.0f);
    prefetch_far(scales + FAR);
HIRE_UNROLL
    for (int q = 0; q < QUADS; q++) {
        const v16 scale = v_sub(v_from_w(w_bytes(line, q)), v_set1((float)HIRE_SCALE_BIAS));
        factor[q] = v_mul(value[q], scale);
        most = v_max(v_abs(factor[q]), most);
        sum = v_add(sum, factor[q]);
    }
    most = v_most_of_four(most);
    const v16 inverse = v_div(v_set1(HIRE_LARGEST), most);
HIRE_UNROLL
    for (int q = 0; q < QUADS; q++)
        w_store(table->digits[q][at], w_by_byte(digits_of(w_round(v_mul(factor[q], inverse)))));
    v_store(table->scale[at], v_mul(most, v_set1(digit_unit(lowest) / HIRE_LARGEST)));
    v_store(offset, v_fma(sum, v_set1((float)-HIRE_LEVEL_BIAS), v_load(offset)));
}

/* The table of blocks [first, last). */
INLINE void fill_table(const hire_layer *layer, v16 value, const uint8_t *scales, rest_table *table,
                       int64_t first, int64_t last, float *offset, const int normal,
                       const int lowest)
{
    if (!normal) {
        for (int64_t b = first; b < last; b++) {
            fill_block(value, scales + 32 * b, table, b - first, lowest);
            add_offset(layer, value, scales + 32 * b, offset + 16 * b);
        }
        return;
    }
    float lanes[HIRE_LANES];
    v16 four[QUADS];
    v_store(lanes, value);
    for (int q = 0; q < QUADS; q++) four[q] = v_four(lanes + 4 * q);
    for (int64_t b = first; b < last; b += 4)
        fill_four_blocks(four, scales + HIRE_LANES * b, table, b - first, offset + 4 * b, lowest);
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
            const int32_t *digit = table->digits[q][place[half]];
            for (int d = lowest; d < DIGITS; d++)
                sum[d] = w_dot(sum[d], code, (const int8_t *)(digit + d));
        }
        const v16 scale = v_set1(table->scale[place[half]][0]);
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
    _Alignas(64) rest_table table;
    for (int64_t first = 0; first < blocks; first += SPAN) {
        const int64_t last = first + SPAN < blocks ? first + SPAN : blocks;
        const int64_t end = last < blocks ? last * block / 16 : vectors;
        fill_table(layer, value, scales, &table, first, last, partial + layer->stride, normal,
                   lowest);
        for (int64_t v = first * block / 16; v < end; v += 2) {
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
        for (int64_t b = 0; b < blocks; b++) {
            const float *four = offset + 4 * b;
            offset[b] = normal ? four[0] + four[1] + (four[2] + four[3])
                               : v_sum(v_load(offset + 16 * b));
        }
        for (int64_t v = 0; v < layer->stride / 16; v++)
            v_store(partial[i] + 16 * v,
                    v_add(v_load(partial[i] + 16 * v),
                          v_set1(offset[runs[i]->rest_scale_of[v]])));
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
