/* Rows of a matrix found again as codes of 8 bits, in tiles (hire_matrix of step.h). Plain loops,
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

/* Rows [from, to); 0 once one does not lie on its grid. */
static int code_rows(const hire_coding *coding, char *scratch, int64_t from, int64_t to)
{
    /* How far a weight may lie from its code: both it and the block's largest were rounded once. */
    static const float rounded[] = {0x1p-21f, 0x1p-7f, 0x1p-9f};
    const float unit = rounded[coding->weight_type];
    const int64_t width = coding->inputs, blocks = (width + coding->block - 1) / coding->block;
    const int64_t size = coding->weight_type == HIRE_FLOAT32 ? 4 : 2;
    const int64_t words = hire_matrix_words(width, coding->block);
    float *weight = (float *)scratch;
    for (int64_t row = from; row < to; row++) {
        const char *raw = (const char *)coding->weight + row * coding->row_stride * size;
        widen(raw, coding->weight_type, width, weight);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = block * coding->block, left = width - start;
            const int64_t n = left < coding->block ? left : coding->block;
            const int64_t place = row / 16 * words + (start + 3) / 4;
            uint8_t *word = coding->codes + 64 * place + row % 16 * 4;
            float *scale = coding->scales + 16 * (row / 16 * blocks + block) + row % 16;
            if (!code_block(weight + start, n, unit, word, scale)) return 0;
        }
    }
    return 1;
}
