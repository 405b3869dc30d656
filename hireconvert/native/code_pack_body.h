/* Rows of a matrix found again as codes of 8 or 4 bits, in tiles (hire_matrix of step.h). Plain loops,
 * compiled once for each level. */
#include "pack_numbers.h"

#define TOP_CODE 127.0f
#define LEAST 0x1p-126f

/* One block of n weights, into words 64 bytes apart; 0 where they are no codes times a 127th of the
 * largest, rounded. */
static int code_block(const float *weight, int64_t n, float unit, uint8_t *word, float *scale)
{
    uint32_t most = 0;
    int bad = 0;
    for (int64_t k = 0; k < n; k++) {
        const uint32_t size = bits_of(weight[k]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    *scale = float_of(most) / TOP_CODE;
    const float divisor = *scale < LEAST ? LEAST : *scale;
    for (int64_t k = 0; k < n; k++) {
        const float place = weight[k] / divisor + TO_NEAREST;
        const float away = fabsf((place - TO_NEAREST) * *scale - weight[k]);
        word[k / 4 * 64 + k % 4] = (uint8_t)(bits_of(place) + HIRE_ZERO_CODE);
        bad |= !(away <= unit * fabsf(weight[k]));
    }
    return !bad;
}

/* A number as weights of a type hold it. */
static inline float stored_as(float value, int64_t type)
{
    if (type == HIRE_BFLOAT16) return float_of((uint32_t)to_bfloat16(value) << 16);
    return type == HIRE_FLOAT16 ? half_to_float(to_float16(value)) : value;
}

static int short_block_fits(const float *weight, int64_t n, int64_t type, const uint8_t *code,
                            uint16_t scale)
{
    const float found = float_of((uint32_t)scale << 16);
    int bad = 0;
    for (int64_t k = 0; k < n; k++) {
        const float own = (float)(NORMAL_LEVELS[code[k]] - HIRE_LEVEL_BIAS);
        bad |= !(stored_as(own * found, type) == weight[k]);
    }
    return !bad;
}

/* Codes and the scale of n weights of normal levels, if `largest` is of this one. A scale has 8 bits:
 * what the rounded weights say of it on average tells all of them, or all but the last. */
static int short_block_at(const float *weight, int64_t n, int64_t type, float largest, int level,
                          uint8_t *code, uint16_t *scale)
{
    const float guess = largest / (float)(NORMAL_LEVELS[level] - HIRE_LEVEL_BIAS);
    float product = 0.0f, square = 0.0f;
    for (int64_t k = 0; k < n; k++) {
        const float place = 2.0f * (weight[k] / guess + (float)HIRE_LEVEL_BIAS);
        int above = 0;
        for (int i = 0; i < 15; i++)
            above += place > (float)(NORMAL_LEVELS[i] + NORMAL_LEVELS[i + 1]);
        code[k] = (uint8_t)above;
    }
    for (int64_t k = 0; k < n; k++) {
        const float own = (float)(NORMAL_LEVELS[code[k]] - HIRE_LEVEL_BIAS);
        product += own * weight[k];
        square += own * own;
    }
    const uint16_t near = to_bfloat16(product / square);
    for (int step = 0; step < 3; step++) {
        *scale = (uint16_t)(near + (step == 1) - (step == 2));
        if (short_block_fits(weight, n, type, code, *scale)) return 1;
    }
    return 0;
}

/* The largest weight is most likely of the outermost levels; 0 where no level gives the weights. */
static int short_block(const float *weight, int64_t n, int64_t type, uint8_t *code,
                       uint16_t *scale)
{
    static const uint8_t outermost[] = {0, 15, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9, 7, 8};
    float largest = 0.0f;
    for (int64_t k = 0; k < n; k++)
        if (fabsf(weight[k]) > fabsf(largest)) largest = weight[k];
    if (largest == 0.0f) {
        int bad = 0;
        for (int64_t k = 0; k < n; k++) {
            code[k] = 0;
            bad |= weight[k] != 0.0f; /* NaN */
        }
        *scale = 0;
        return !bad;
    }
    for (int i = 0; i < 16; i++)
        if (short_block_at(weight, n, type, largest, outermost[i], code, scale)) return 1;
    return 0;
}

static int code_row(const hire_coding *coding, const float *weight, int64_t row)
{
    const int64_t width = coding->inputs, blocks = (width + coding->block - 1) / coding->block;
    const int64_t words = hire_matrix_words(width, coding->block, 4);
    /* How far a weight may lie from its code: both it and the block's largest were rounded once. */
    static const float rounded[] = {0x1p-21f, 0x1p-7f, 0x1p-9f};
    const float unit = rounded[coding->weight_type];
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * coding->block, left = width - start;
        const int64_t n = left < coding->block ? left : coding->block;
        const int64_t place = row / 16 * words + (start + 3) / 4;
        uint8_t *word = coding->codes + 64 * place + row % 16 * 4;
        float *scale = coding->scales + 16 * (row / 16 * blocks + block) + row % 16;
        if (!code_block(weight + start, n, unit, word, scale)) return 0;
    }
    return 1;
}

static int short_code_row(const hire_coding *coding, const float *weight, uint8_t *code, int64_t row)
{
    const int64_t width = coding->inputs, block = coding->block;
    uint8_t *out = coding->codes + row / 16 * hire_int4_tile(width, block), *scales = out;
    for (int64_t start = 0, b = 0; start < width; start += block, b++) {
        const int64_t n = width - start < block ? width - start : block;
        uint16_t scale;
        if (!short_block(weight + start, n, coding->weight_type, code, &scale)) return 0;
        if (b % 2 == 0) {
            scales = out;
            out += HIRE_LINE;
        }
        memcpy(scales + 32 * (b % 2) + row % 16 * 2, &scale, sizeof scale);
        for (int64_t k = 0; k < n; k++)
            out[k / 8 * 64 + row % 16 * 4 + k % 4] |= (uint8_t)(code[k] << k / 4 % 2 * 4);
        out += (n + 7) / 8 * 64;
    }
    return 1;
}

/* Rows [from, to); 0 once one does not lie on its grid. */
static int code_rows(const hire_coding *coding, char *scratch, int64_t from, int64_t to)
{
    const int64_t size = coding->weight_type == HIRE_FLOAT32 ? 4 : 2;
    float *weight = (float *)scratch;
    uint8_t *code = (uint8_t *)(weight + coding->inputs);
    for (int64_t row = from; row < to; row++) {
        const char *raw = (const char *)coding->weight + row * coding->row_stride * size;
        widen(raw, coding->weight_type, coding->inputs, weight);
        if (!(coding->bits == 4 ? short_code_row(coding, weight, code, row)
                                : code_row(coding, weight, row)))
            return 0;
    }
    return 1;
}
