/* A layer's neurons laid out for the kernels. Plain loops, compiled once for each level. */
#include "pack_numbers.h"

static const uint8_t NORMAL_LEVELS[16] = HIRE_NORMAL_LEVELS;

#define MIDDLE 7.5f /* of 4-bit codes around zero */
#define SIXTEEN (2 * HIRE_LANES) /* bytes of the scales of a tile */

typedef struct {
    char *raw;        /* [HIRE_PACK_UNIT, row]: rows of a transposed matrix */
    float *weight;    /* [row] */
    float *value;     /* [row] */
    float *ones;      /* [row] */
    uint8_t *codes;   /* [HIRE_LANES, stride] of the copy, zeros behind D */
    uint8_t *low;     /* [stride], zeros behind D */
} pack_run;

/* ------------------------------------------------------------------ codes */

/* The codes of one row of bit planes, zeros behind them. */
static void unpack(const hire_copy *copy, int64_t row, int64_t width, int64_t stride, uint8_t *out)
{
    const int64_t bytes = (width + 7) / 8, plane = copy->rows * bytes;
    const uint8_t *from = copy->planes + row * bytes;
    const uint64_t each = 0x0101010101010101, own = 0x8040201008040201;
    for (int64_t k = 0; k < bytes; k++) {
        uint64_t codes = 0;
        for (int64_t bit = 0; bit < copy->bits; bit++) {
            const uint64_t set = from[bit * plane + k] * each & own; /* bit i in byte i, or 0 */
            codes |= ((set + 0x7f * each) >> 7 & each) << bit;
        }
        memcpy(out + 8 * k, &codes, 8);
    }
    memset(out + width, 0, (size_t)(stride - width));
}

/* A word of `num` quads of codes, `bits` of each from bit `first` on. */
static inline uint32_t quads(const uint8_t *code, int num, int first, int bits)
{
    const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    uint32_t word = 0;
    for (int quad = 0; quad < num; quad++) {
        uint32_t four;
        memcpy(&four, code + 4 * quad, sizeof four);
        word |= (four >> first & mask) << bits * quad;
    }
    return word;
}

/* n codes of one lane in whole units, `apart` bytes from one to the next, of words 64 bytes apart. */
static inline void put_lane(uint8_t *out, const uint8_t *code, int64_t n, int bits, int64_t apart)
{
    const int64_t unit = bits == 3 ? 32 : 32 / bits;
    for (int64_t k = 0; k < n; k += unit) {
        uint8_t last[32] = {0};
        const uint8_t *from = code + k;
        if (n - k < unit) from = memcpy(last, from, (size_t)(n - k));
        if (bits == 4) {
            put(out, quads(from, 2, 0, 4));
        } else if (bits == 2) {
            put(out, quads(from, 4, 0, 2));
        } else {
            put(out, quads(from, 4, 0, 2));
            put(out + 64, quads(from + 16, 4, 0, 2));
            put(out + 128, quads(from, 8, 2, 1));
        }
        out += apart;
    }
}

/* Codes [stride / 16, 16] as in rest_float_body.h; returns the end. */
static uint8_t *put_lanes(uint8_t *out, const uint8_t *code, int64_t stride, int bits)
{
    const int64_t steps = stride / HIRE_LANES, per_word = 32 / bits;
    for (int64_t step = 0; step < steps; step += per_word) {
        const int64_t num = steps - step < per_word ? steps - step : per_word;
        const int64_t size = num == per_word ? 4 : num * bits <= 8 ? 1 : num * bits <= 16 ? 2 : 4;
        uint32_t word[HIRE_LANES] = {0};
        for (int64_t k = 0; k < num; k++)
            for (int lane = 0; lane < HIRE_LANES; lane++)
                word[lane] |= (uint32_t)code[(step + k) * HIRE_LANES + lane] << k * bits;
        for (int lane = 0; lane < HIRE_LANES; lane++)
            memcpy(out + lane * size, word + lane, (size_t)size); /* the low bytes come first */
        out += HIRE_LANES * size;
    }
    return out;
}

static int64_t blocks_of(const hire_copy *copy, int64_t width)
{
    return (width + copy->block - 1) / copy->block;
}

static uint8_t *put_scales(uint8_t *out, const uint16_t *scale, int64_t row, int64_t blocks)
{
    if (scale == NULL) return out;
    memcpy(out, scale + row * blocks, (size_t)(2 * blocks));
    return out + 2 * blocks;
}

/* ------------------------------------------------------------------ tiles */

/* The scales of n neighbouring rows, each `blocks` behind the other, zeros up to a whole tile. */
static void put_sixteen(uint8_t *out, const uint16_t *scale, int64_t n, int64_t blocks)
{
    uint16_t sixteen[HIRE_LANES] = {0};
    for (int64_t lane = 0; lane < n; lane++) sixteen[lane] = scale[lane * blocks];
    memcpy(out, sixteen, sizeof sixteen);
}

/* The same of normal levels. */
static void put_sixteen_codes(uint8_t *out, const int8_t *codes, int64_t n, int64_t blocks)
{
    for (int64_t lane = 0; lane < HIRE_LANES; lane++)
        out[lane] = (uint8_t)(HIRE_SCALE_BIAS + (lane < n ? codes[lane * blocks] : 0));
}

/* The part's codes and scales in the tile of estimates, where run->codes holds n neurons. */
static void put_tile(const hire_packing *packing, const pack_run *run, int64_t tile, int64_t part,
                     int64_t n)
{
    const hire_copy *copy = &packing->first;
    const int64_t width = packing->width, parts = packing->parts, bits = copy->bits;
    const int64_t blocks = blocks_of(copy, width), unit = bits == 3 ? 32 : 32 / bits;
    const int64_t first = part * packing->num_neurons + tile * HIRE_LANES;
    const int64_t together = HIRE_LINE / (parts * HIRE_LANES); /* blocks of a line of scales */
    uint8_t *out = packing->tiles + tile * packing->tile_bytes, *scales = out;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * copy->block, left = width - start;
        const int64_t num = left < copy->block ? left : copy->block;
        const int64_t size = bits == 3 ? 192 : 64;
        if (copy->codes != NULL && block % together == 0) {
            if (part == 0) memset(out, 0, HIRE_LINE);
            scales = out;
            out += HIRE_LINE;
        }
        for (int64_t lane = 0; lane < HIRE_LANES; lane++)
            put_lane(out + part * size + 4 * lane, run->codes + lane * packing->stride + start,
                     num, (int)bits, parts * size);
        out += parts * size * ((num + unit - 1) / unit);
        if (copy->codes != NULL) {
            put_sixteen_codes(scales + (block % together * parts + part) * HIRE_LANES,
                              copy->codes + first * blocks + block, n, blocks);
            continue;
        }
        uint8_t *own = out + part * SIXTEEN;
        put_sixteen(own, copy->scale + first * blocks + block, n, blocks);
        if (copy->offset != NULL)
            put_sixteen(own + parts * SIXTEEN, copy->offset + first * blocks + block, n, blocks);
        out += parts * SIXTEEN * (copy->offset == NULL ? 1 : 2);
    }
}

static uint8_t *put_rest_scales(uint8_t *out, const uint16_t *scale, int64_t n, int64_t blocks)
{
    for (int64_t block = 0; block < blocks; block++, out += SIXTEEN)
        put_sixteen(out, scale + block, n, blocks);
    return out;
}

/* The n output rows of run->codes in a tile of 4 bits, as in rest_body.h. */
static void put_rest_tile(const hire_packing *packing, const pack_run *run, int64_t tile, int64_t n)
{
    const int64_t stride = packing->stride, blocks = blocks_of(&packing->down, packing->width);
    uint8_t *out = packing->rest + tile * packing->rest_bytes;
    const int64_t first = tile * HIRE_LANES * blocks;
    if (packing->down.codes != NULL) {
        memset(out, 0, (size_t)hire_whole_lines(HIRE_LANES * blocks));
        for (int64_t block = 0; block < blocks; block++)
            put_sixteen_codes(out + HIRE_LANES * block, packing->down.codes + first + block, n,
                              blocks);
        out += hire_whole_lines(HIRE_LANES * blocks);
    } else {
        out = put_rest_scales(out, packing->down.scale + first, n, blocks);
    }
    if (packing->down.offset != NULL)
        out = put_rest_scales(out, packing->down.offset + first, n, blocks);
    for (int64_t start = 0; start < stride; start += 32)
        for (int64_t four = 0; four < HIRE_LANES; four += 4) {
            const uint8_t *code = run->codes + four * stride + start;
            for (int lane = 0; lane < HIRE_LANES; lane++)
                for (int k = 0; k < 4; k++)
                    out[4 * lane + k] =
                        (uint8_t)(code[k * stride + lane] | code[k * stride + 16 + lane] << 4);
            out += 64;
        }
}

static void put_rest_rows(const hire_packing *packing, const pack_run *run, int64_t from, int64_t n)
{
    const hire_copy *copy = &packing->down;
    const int64_t blocks = blocks_of(copy, packing->width);
    for (int64_t k = 0; k < n; k++) {
        uint8_t *out = packing->rest + (from + k) * packing->rest_bytes;
        out = put_lanes(out, run->codes + k * packing->stride, packing->stride, (int)copy->bits);
        out = put_scales(out, copy->scale, from + k, blocks);
        put_scales(out, copy->offset, from + k, blocks);
    }
}

/* ------------------------------------------------------------------ weights */

/* Neuron `from` + k of a unit that `gather` was called for: its weights side by side. */
static const char *raw_row(const hire_packing *packing, const pack_run *run,
                           const hire_dense *dense, int64_t from, int64_t k)
{
    const int64_t size = packing->weight_type == HIRE_FLOAT32 ? 4 : 2;
    if (dense->column_stride == 1)
        return (const char *)dense->weight + (from + k) * dense->row_stride * size;
    return run->raw + k * hire_pack_row(packing->width) * size;
}

/* Brings the n rows of a matrix that lie across others into run->raw; others stay where they are. */
static void gather(const hire_packing *packing, const pack_run *run, const hire_dense *dense,
                   int64_t from, int64_t n)
{
    const int64_t row = hire_pack_row(packing->width), down = dense->row_stride;
    if (dense->column_stride == 1) return;
    for (int64_t column = 0; column < packing->width; column++) {
        const int64_t place = from * down + column * dense->column_stride;
        if (packing->weight_type == HIRE_FLOAT32) {
            const float *weight = (const float *)dense->weight + place;
            for (int64_t k = 0; k < n; k++)
                ((float *)run->raw)[k * row + column] = weight[k * down];
        } else {
            const uint16_t *weight = (const uint16_t *)dense->weight + place;
            for (int64_t k = 0; k < n; k++)
                ((uint16_t *)run->raw)[k * row + column] = weight[k * down];
        }
    }
}

static void put_rows(const hire_packing *packing, const pack_run *run, int64_t part, int64_t from,
                     int64_t n)
{
    const int64_t size = packing->weight_type == HIRE_FLOAT32 ? 4 : 2;
    const int64_t row = packing->stride * size, used = packing->width * size;
    for (int64_t k = 0; k < n; k++) {
        char *out = (char *)packing->rows + ((from + k) * (packing->parts + 1) + part) * row;
        memcpy(out, raw_row(packing, run, packing->dense + part, from, k), (size_t)used);
        memset(out + used, 0, (size_t)(row - used));
    }
}

/* ------------------------------------------------------------------ refined rows */

/* What a row's codes stand for in the copy's own scaling of the columns, in run->value. */
static void decode(const hire_packing *packing, const hire_copy *copy, const pack_run *run,
                   const uint8_t *code, int64_t row)
{
    const int64_t width = packing->width, blocks = blocks_of(copy, width);
    const float zero = copy->offset == NULL ? (float)((1 << copy->bits) - 1) / 2 : 0.0f;
    for (int64_t k = 0; k < width; k++)
        run->value[k] = copy->codes != NULL ? (float)(NORMAL_LEVELS[code[k] & 15] - HIRE_LEVEL_BIAS)
                                            : (float)code[k] - zero;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t end = (block + 1) * copy->block, to = end < width ? end : width;
        const int64_t place = row * blocks + block;
        const float scale = copy->codes != NULL ? (float)copy->codes[place] * copy->unit[row]
                                                : half_to_float(copy->scale[place]);
        const float offset = copy->offset == NULL ? 0.0f : half_to_float(copy->offset[place]);
        for (int64_t k = block * copy->block; k < to; k++)
            run->value[k] = run->value[k] * scale + offset;
    }
}

static uint32_t larger_of(uint32_t largest, float value)
{
    const uint32_t size = bits_of(value) & 0x7fffffff;
    return size > largest ? size : largest;
}

/* Codes of what the copy left of run->weight, and the values that it makes with them; returns the
 * bits of the largest magnitude among these, which are more than any number's where one is NaN. */
static uint32_t refine(const hire_packing *packing, const hire_copy *copy, const pack_run *run,
                       const float *factor, const uint8_t *code, int64_t row)
{
    const int64_t width = packing->width, blocks = blocks_of(copy, width);
    uint32_t largest = 0;
    decode(packing, copy, run, code, row);
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t end = (block + 1) * copy->block, to = end < width ? end : width;
        const float low = half_to_float(copy->low[row * blocks + block]);
        for (int64_t k = block * copy->block; k < to; k++) {
            const float own = run->value[k];
            float place = (run->weight[k] * factor[k] - own) / low + MIDDLE;
            place = place < 0.0f ? 0.0f : place; /* NaN stays */
            place = place > 2 * MIDDLE ? 2 * MIDDLE : place;
            place += TO_NEAREST;
            run->low[k] = (uint8_t)(bits_of(place) & 15);
            run->value[k] = (own + low * (place - TO_NEAREST - MIDDLE)) / factor[k];
            largest = larger_of(largest, run->value[k]);
        }
    }
    return largest;
}

/* Whether run->weight are run->value, rounded to their type. */
static int is_rounded(const hire_packing *packing, const pack_run *run, uint32_t largest)
{
    static const float rounded[] = {0x1p-20f, 0x1p-8f, 0x1p-10f};
    const float unit = rounded[packing->weight_type], more = 0x1p-20f * float_of(largest);
    int bad = 0;
    for (int64_t k = 0; k < packing->width; k++) {
        const float weight = run->weight[k], value = run->value[k];
        const float a = fabsf(weight), b = fabsf(value);
        /* Of the larger: a value below a power of two may have been rounded up to it. */
        const float allowed = unit * (a > b ? a : b) + more;
        bad |= !(fabsf(weight - value) <= allowed) | !(a < INFINITY);
    }
    return !bad;
}

static double product(const float *a, const float *b, int64_t n)
{
    double part[8] = {0}, sum = 0.0;
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int lane = 0; lane < 8; lane++) part[lane] += (double)a[k + lane] * b[k + lane];
    for (; k < n; k++) sum += (double)a[k] * b[k];
    for (int lane = 0; lane < 8; lane++) sum += part[lane];
    return sum;
}

/* The codes and scales of gate or up in their row (low_rows.h). */
static void put_low_words(const hire_low_rows *rows, const pack_run *run, const uint16_t *scale,
                          int64_t part, int64_t width, int64_t block, uint8_t *out)
{
    for (int64_t begin = 0, b = 0; begin < width; begin += block, b++) {
        memcpy(out + hire_low_scale(rows, part, b), scale + b, sizeof *scale);
        for (int64_t word = 0; word < rows->words && begin + 8 * word < width; word++) {
            const int64_t vector = hire_low_vector(rows, b, word);
            put(out + 64 * vector + 4 * hire_low_lane(rows, part, b, word),
                quads(run->low + begin + 8 * word, 2, 0, 4));
        }
    }
}

/* Those of down. */
static void put_low_lines(const hire_low_rows *rows, const pack_run *run, const uint16_t *scale,
                          int64_t width, int64_t blocks, uint8_t *out)
{
    for (int64_t k = 0; k < width; k++) {
        const int64_t vector = k % 128 / 16, lane = k % 16;
        uint8_t *line = out + rows->down + 64 * (k / 128);
        line[16 * (lane / 4) + 4 * (vector % 4) + lane % 4] |=
            (uint8_t)(run->low[k] << (vector < 4 ? 0 : 4));
    }
    memcpy(out + rows->down_scales, scale, (size_t)blocks * sizeof *scale);
}

/* What the copies left of a part of n neurons, whose codes run->codes holds. */
static int put_low(const hire_packing *packing, const pack_run *run, int64_t part, int64_t from,
                   int64_t first, int64_t n)
{
    const int64_t stride = packing->stride, width = packing->width, is_down = part == packing->parts;
    const hire_copy *copy = is_down ? &packing->down : &packing->first;
    const int64_t blocks = blocks_of(copy, width);
    const hire_low_rows rows = hire_low_rows_of(width, packing->parts, packing->first.block,
                                                packing->down.block);
    for (int64_t k = 0; k < n; k++) {
        const int64_t row = is_down ? first + k : part * packing->num_neurons + first + k;
        const char *raw = raw_row(packing, run, packing->dense + part, from, first - from + k);
        const uint16_t *scale = copy->low + row * blocks;
        uint8_t *out = packing->low + (first + k) * packing->low_bytes;
        widen(raw, packing->weight_type, width, run->weight);
        const uint32_t largest = refine(packing, copy, run, is_down ? run->ones : packing->factor,
                                        run->codes + k * stride, row);
        if (!is_rounded(packing, run, largest)) return 0;
        if (part == 0) memset(out, 0, (size_t)packing->low_bytes);
        if (is_down) {
            put_low_lines(&rows, run, scale, width, blocks, out);
        } else {
            packing->low_sum[row] = product(run->value, packing->mean, width);
            put_low_words(&rows, run, scale, part, width, copy->block, out);
        }
    }
    return 1;
}

/* ------------------------------------------------------------------ weights that are their copies */

static int packs_copies(const hire_packing *packing)
{
    return packing->factor != NULL && packing->low == NULL && packing->rows == NULL;
}

/* Whether a part of n neurons, whose codes run->codes holds, has the weights that these stand for. */
static int are_copies(const hire_packing *packing, const pack_run *run, int64_t part, int64_t from,
                      int64_t first, int64_t n)
{
    const int64_t width = packing->width, is_down = part == packing->parts;
    const hire_copy *copy = is_down ? &packing->down : &packing->first;
    const float *factor = is_down ? run->ones : packing->factor;
    for (int64_t k = 0; k < n; k++) {
        const int64_t row = is_down ? first + k : part * packing->num_neurons + first + k;
        uint32_t largest = 0;
        widen(raw_row(packing, run, packing->dense + part, from, first - from + k),
              packing->weight_type, width, run->weight);
        decode(packing, copy, run, run->codes + k * packing->stride, row);
        for (int64_t j = 0; j < width; j++) {
            run->value[j] /= factor[j];
            largest = larger_of(largest, run->value[j]);
        }
        if (!is_rounded(packing, run, largest)) return 0;
    }
    return 1;
}

/* ------------------------------------------------------------------ a unit of neurons */

static int pack_part(const hire_packing *packing, const pack_run *run, int64_t part, int64_t from,
                     int64_t to)
{
    const int is_down = part == packing->parts;
    const hire_copy *copy = is_down ? &packing->down : &packing->first;
    const int64_t stride = packing->stride;
    if (packing->low != NULL || packing->rows != NULL || packs_copies(packing))
        gather(packing, run, packing->dense + part, from, to - from);
    if (packing->rows != NULL) put_rows(packing, run, part, from, to - from);
    if (copy->planes == NULL) return 1;
    for (int64_t first = from; first < to; first += HIRE_LANES) {
        const int64_t n = to - first < HIRE_LANES ? to - first : HIRE_LANES;
        const int64_t tile = first / HIRE_LANES;
        memset(run->codes, 0, (size_t)(HIRE_LANES * stride));
        for (int64_t k = 0; k < n; k++)
            unpack(copy, (is_down ? 0 : part * packing->num_neurons) + first + k, packing->width,
                   stride, run->codes + k * stride);
        if (!is_down && packing->tiles != NULL) put_tile(packing, run, tile, part, n);
        if (is_down && packing->rest != NULL && copy->bits == 4)
            put_rest_tile(packing, run, tile, n);
        else if (is_down && packing->rest != NULL)
            put_rest_rows(packing, run, first, n);
        if (packing->low != NULL && !put_low(packing, run, part, from, first, n)) return 0;
        if (packs_copies(packing) && !are_copies(packing, run, part, from, first, n)) return 0;
    }
    return 1;
}

static int pack_neurons(const hire_packing *packing, char *scratch, int64_t from, int64_t to)
{
    const int64_t row = hire_pack_row(packing->width), stride = packing->stride;
    float *floats = (float *)scratch + HIRE_PACK_UNIT * row;
    uint8_t *bytes = (uint8_t *)(floats + 3 * row);
    const pack_run run = {scratch, floats,         floats + row,
                          floats + 2 * row, bytes, bytes + HIRE_LANES * stride};
    for (int64_t k = 0; k < packing->width; k++) run.ones[k] = 1.0f;
    memset(run.low, 0, (size_t)stride);
    for (int64_t start = from; start < to; start += HIRE_PACK_UNIT) {
        const int64_t end = start + HIRE_PACK_UNIT < to ? start + HIRE_PACK_UNIT : to;
        for (int64_t part = 0; part <= packing->parts; part++)
            if (!pack_part(packing, &run, part, start, end)) return 0;
    }
    return 1;
}
